"""`config`, `from_config`, `from_pretrained` and their inverses in the file format of diffusers schedulers."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import FrozenDict

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class SchedulerConfigMixin:
    """Settings of a scheduler, read from and written to `scheduler_config.json` as diffusers does."""

    config_name = "scheduler_config.json"

    def register_to_config(self, **settings: Any) -> None:
        """Add or replace settings in `config`."""
        self._internal_dict = FrozenDict({**getattr(self, "_internal_dict", {}), **settings})

    @property
    def config(self) -> FrozenDict:
        """The constructor arguments, and whatever else the config this was built from held."""
        return self._internal_dict

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from the config of this or another scheduler; keywords override settings.

        Settings the constructor does not know are kept in `config` for whoever reads it next. Settings that the other
        scheduler had not been given but filled in (`_use_default_values`) are left to our own defaults.

        Returns: the scheduler, or with `return_unused_kwargs` (scheduler, everything the constructor did not take).

        Raises:
            ValueError: if `config` is no mapping.
        """
        if not isinstance(config, Mapping):
            raise ValueError(
                f"config: got {type(config).__name__}, expected a dict of settings; to read files use from_pretrained"
            )
        filled_in = {*config.get("_use_default_values", ()), "_use_default_values"}
        settings = {key: value for key, value in config.items() if key not in filled_in}
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        given = {name: kwargs.pop(name, settings.get(name)) for name in known if name in kwargs or name in settings}
        kept = {key: value for key, value in settings.items() if key not in known}
        ignored = [key for key in kept if not key.startswith("_")]
        if ignored and config.get("_class_name", cls.__name__) == cls.__name__:
            logger.warning("%s: settings not known here are ignored: %s", cls.__name__, ", ".join(ignored))

        scheduler = cls(**given)
        if "_class_name" in kept:
            kept["_class_name"] = cls.__name__
        scheduler.register_to_config(**kept)
        return (scheduler, {**kept, **kwargs}) if return_unused_kwargs else scheduler

    @classmethod
    def load_config(cls, path: str | os.PathLike, subfolder: str | None = None, **hub_options: Any) -> dict[str, Any]:
        """Read `scheduler_config.json` of a directory, of its `subfolder`, or of a model on the Hugging Face Hub.

        Raises:
            OSError: if the file is not there.
            ValueError: if it holds no JSON object.
        """
        file = Path(path)
        if file.is_dir():
            places = [file / subfolder, file] if subfolder else [file]
            found = [place / cls.config_name for place in places if (place / cls.config_name).is_file()]
            if not found:
                raise OSError(f"no {cls.config_name} in {' or '.join(map(str, places))}")
            file = found[0]
        elif not file.is_file():
            file = cls._download(str(path), subfolder, hub_options)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise OSError(f"{file} is not a valid JSON file: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{file}: got a JSON {type(config).__name__}, expected a JSON object")
        return config

    @classmethod
    def _download(cls, repo: str, subfolder: str | None, options: dict[str, Any]) -> Path:
        try:
            from huggingface_hub import hf_hub_download
        except ImportError as error:
            raise OSError(
                f"{repo!r} is no file or directory here; fetching it from the Hub needs `pip install huggingface_hub`"
            ) from error
        return Path(hf_hub_download(repo, cls.config_name, subfolder=subfolder, **options))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, subfolder: str | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """`from_config` of the file `load_config` finds; see both. Hub options are among the keywords."""
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        return cls.from_config(cls.load_config(path, subfolder, **options), return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        """The settings as diffusers writes them."""
        settings = {key: value for key, value in self.config.items() if key != "_use_default_values"}
        settings["_class_name"] = type(self).__name__
        try:
            settings["_diffusers_version"] = metadata.version("diffusers")
        except metadata.PackageNotFoundError:
            settings.pop("_diffusers_version", None)
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Write `scheduler_config.json` into a directory, which is made if need be.

        Raises:
            ValueError: if the path is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"save_directory: got the file {directory}, expected a directory")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.config_name).write_text(self.to_json_string(), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """`save_config`, under the name pipelines call; their further keywords are about weights and do nothing here.

        Raises:
            ValueError: for `push_to_hub=True`.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: got True, expected False; save first, then upload the directory")
        self.save_config(save_directory)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
