"""What tests, benches and `anyflow verify` share: inputs of every operation, float64, and the error law."""
