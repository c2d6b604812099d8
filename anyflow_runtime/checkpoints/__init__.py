"""Key layouts of AnyFlow checkpoints: diffusers, the original research code, FastGen (both), FastVideo."""

from __future__ import annotations

from .convert import LAYOUTS, check_config, convert, convert_state_dict, detect_layout, read_checkpoint
from .fastgen import from_fastgen, to_fastgen
from .fastvideo import from_fastvideo, to_fastvideo
from .renames import Report
from .research import from_research, read_research

__all__ = [
    "LAYOUTS", "Report", "check_config", "convert", "convert_state_dict", "detect_layout", "from_fastgen",
    "from_fastvideo", "from_research", "read_checkpoint", "read_research", "to_fastgen", "to_fastvideo",
]  # fmt: skip
