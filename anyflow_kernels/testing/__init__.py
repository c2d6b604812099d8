"""What tests, benches and `anyflow verify` share: inputs of every operation, and the error law."""
