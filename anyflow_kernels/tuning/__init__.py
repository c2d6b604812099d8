"""The machine decides, by evidence: which implementation and which launch parameters serve on this card.

`subjects` says what is tuned and what the candidates are, `trial` judges and times them; `anyflow tune` writes what
comes of it, and `launch_configs.tuned` is where launches read it.
"""
