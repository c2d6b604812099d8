"""Config system: frozen and hashable, derived by rebuilding, printed as a tree, read and written as plain data."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyflow_runtime import wan_vae
from anyflow_runtime.schedulers import FlowMapEulerDiscreteScheduler
from anyflow_runtime.streaming import FrozenDict, InstantiateConfig, PrintableConfig, derive_config


class Engine(ABC):
    def __init__(self, config: Any, **kwargs: Any) -> None:
        self.config, self.kwargs = config, kwargs

    @abstractmethod
    def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EngineConfig(InstantiateConfig):
    _target: type[Engine] = field(default_factory=lambda: Engine)


@dataclass(frozen=True, kw_only=True)
class PetrolConfig(EngineConfig):
    _target: type[Petrol] = field(default_factory=lambda: Petrol)  # defined below: the default must be lazy
    cylinders: int = 4
    idle_rpm: int = 800
    max_rpm: int = 6000
    gears: Any = (1, 2, 3)
    options: Any = None

    def __post_init__(self) -> None:  # without super(): the base must freeze the fields all the same
        if self.idle_rpm > self.max_rpm:
            raise ValueError(f"idle_rpm: got {self.idle_rpm}, expected at most max_rpm = {self.max_rpm}")


@dataclass(frozen=True, kw_only=True)
class CarConfig(PrintableConfig):
    name: str = "car"
    engine: EngineConfig = field(default_factory=PetrolConfig)
    spare: EngineConfig | None = None
    dtype: torch.dtype = torch.float32
    folder: Path = Path("garage")


class Petrol(Engine):
    def run(self) -> None: ...


class Holder:
    """A plain object with attributes, as a patch may also walk into."""

    def __init__(self) -> None:
        self.depth = 1
        self.inner = {"a": 1}


@dataclass(frozen=True)
class Tank:
    litres: int = 40


def test_setup_calls_the_target_with_config_and_keywords():
    config = PetrolConfig()
    engine = config.setup(colour="red")
    assert type(engine) is Petrol and engine.config is config and engine.kwargs == {"colour": "red"}


def test_setup_of_an_abstract_target_raises():
    with pytest.raises(TypeError, match="abstract"):
        EngineConfig().setup()


def test_fields_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        InstantiateConfig(Petrol)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PetrolConfig().cylinders = 6


def test_equal_configs_hash_equal_and_others_differ():
    assert {CarConfig(): 1}[CarConfig()] == 1
    assert CarConfig() != derive_config(CarConfig(), engine={"cylinders": 6})


def test_list_and_dict_fields_become_hashable_and_keep_their_values():
    config = PetrolConfig(gears=[1, [2, 3]], options={"fuel": ["a", "b"], "deep": {"x": 1}})
    assert config.gears == (1, (2, 3)) and config.options == {"fuel": ("a", "b"), "deep": {"x": 1}}
    assert hash(config) == hash(PetrolConfig(gears=(1, (2, 3)), options={"deep": {"x": 1}, "fuel": ("a", "b")}))


@pytest.mark.parametrize("change", [lambda d: d.update(a=2), lambda d: d.pop("a"), lambda d: d.__setitem__("a", 2)])
def test_dict_fields_cannot_be_changed_in_place(change):
    config = PetrolConfig(options={"a": 1})
    with pytest.raises(TypeError, match="derive_config"):
        change(config.options)
    assert config.options == {"a": 1}


def test_unhashable_field_is_named():
    with pytest.raises(TypeError, match=r"PetrolConfig\.options: .*bytearray"):
        PetrolConfig(options=bytearray(b"x"))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_configs_copy_and_pickle(duplicate):
    config = CarConfig(engine=PetrolConfig(options={"a": [1]}))
    assert duplicate(config) == config and hash(duplicate(config)) == hash(config)


def test_derive_changes_nested_fields_and_leaves_the_base_alone():
    base = CarConfig(engine=PetrolConfig(options={"fuel": "e5", "oil": 1}))
    before = str(base)
    derived = derive_config(base, name="fast", engine={"cylinders": 8, "options": {"fuel": "e10"}})
    assert (derived.name, derived.engine.cylinders) == ("fast", 8)
    assert derived.engine.options == {"fuel": "e10", "oil": 1} and hash(derived) is not None
    assert str(base) == before and type(derived.engine) is PetrolConfig


def test_derived_config_shares_no_mutable_leaf_with_its_base():
    base = PetrolConfig(options=Holder())
    derived = derive_config(base, cylinders=2)
    derived.options.depth = 5
    assert base.options.depth == 1


def test_new_values_are_taken_as_they_are():
    holder = Holder()
    assert derive_config(PetrolConfig(), options=holder).options is holder


def test_derive_walks_into_plain_objects_and_dicts():
    base = PetrolConfig(options=Holder())
    derived = derive_config(base, options={"depth": 2, "inner": {"a": 3}})
    assert (derived.options.depth, derived.options.inner) == (2, {"a": 3})
    assert (base.options.depth, base.options.inner) == (1, {"a": 1})


def test_a_subtree_can_be_replaced_and_none_filled():
    replaced = derive_config(CarConfig(), engine=PetrolConfig(cylinders=12), spare=PetrolConfig(cylinders=1))
    assert (replaced.engine.cylinders, replaced.spare.cylinders) == (12, 1)
    assert derive_config(replaced, spare=None).spare is None


def test_derive_reruns_the_checks_across_fields():
    with pytest.raises(ValueError, match="idle_rpm"):
        derive_config(CarConfig(), engine={"max_rpm": 500})
    assert derive_config(CarConfig(), engine={"max_rpm": 500, "idle_rpm": 400}).engine.max_rpm == 500


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"colour": 1}, r"CarConfig: CarConfig\.colour"),
        ({"engine": {"colour": 1}}, r"CarConfig\.engine: PetrolConfig\.colour"),
        ({"engine": {"options": {"gas": 1}}}, r"CarConfig\.engine\.options: gas"),
        ({"engine": {"setup": 3}}, r"CarConfig\.engine: PetrolConfig\.setup"),  # a method is no field
    ],
)
def test_unknown_names_raise_with_their_path(changes, path):
    with pytest.raises(KeyError, match=path):
        derive_config(CarConfig(engine=PetrolConfig(options={"fuel": 1})), **changes)


@pytest.mark.parametrize("holder", [None, 3, [1], (1,), "text", Petrol])
def test_dict_patch_onto_a_leaf_raises(holder):
    with pytest.raises(TypeError, match=r"PetrolConfig\.options holds"):
        derive_config(PetrolConfig(options=holder), options={"a": 1})


@given(st.dictionaries(st.text(), st.integers(), min_size=1), st.data())
def test_any_key_of_a_dict_field_can_be_derived_and_no_other_changes(options, data):
    key = data.draw(st.sampled_from(sorted(options)))
    derived = derive_config(PetrolConfig(options=options), options={key: -1})
    assert derived.options == {**options, key: -1}


def test_str_is_indented_with_tuples_one_item_per_line():
    config = CarConfig(engine=PetrolConfig(gears=(1, 2), options={"a": 1}))
    assert str(config).split("\n") == [
        "CarConfig:",
        "    name: car",
        "    engine: PetrolConfig:",
        f"        _target: <class '{Petrol.__module__}.Petrol'>",
        "        cylinders: 4",
        "        idle_rpm: 800",
        "        max_rpm: 6000",
        "        gears: [1",
        "        2]",
        "        options: {'a': 1}",
        "    spare: None",
        "    dtype: torch.float32",
        "    folder: garage",
    ]


def test_str_of_an_empty_tuple():
    assert "gears: []" in str(PetrolConfig(gears=()))


def test_plain_form_rebuilds_an_equal_config():
    config = CarConfig(engine=PetrolConfig(gears=[1, 2], options={"a": [1.5, None]}), dtype=torch.bfloat16)
    data = config.to_dict()
    assert CarConfig.from_dict(data) == config and type(data["engine"]["gears"]) is list


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"colour": 1}, ValueError, r"data: got unknown keys \['data.colour'\], expected some of \['name', 'engine'"),
        ({"engine": {"$config": f"{__name__}:PetrolConfig", "gear": 1}}, ValueError, r"\['data.engine.gear'\]"),
        ({"engine": {"cylinders": 3}}, ValueError, r"data.engine: got unknown keys \['data.engine.cylinders'\]"),
        ({"name": 3}, TypeError, "data.name: got 3, expected str"),
        ({"dtype": {"$dtype": "save"}}, ValueError, "data.dtype: got 'save', expected the name of a torch dtype"),
    ],
)
def test_plain_form_with_a_mistake_names_its_dotted_path(change, error, message):
    with pytest.raises(error, match=message):
        CarConfig.from_dict({**CarConfig().to_dict(), **change})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("decoders.wan_vae", wan_vae.WanVAEStreamDecoderConfig(path="here")),
        ("encoders.wan_vae", wan_vae.WanVAEEncoderConfig(path="here", dtype=torch.float16)),
    ],
)
def test_files_that_name_a_class_by_an_old_module_are_still_read(old, new):
    """Its `$config`, and the `$class` of its target; both have moved since."""
    text = json.dumps(new.to_dict()).replace(f"{type(new).__module__}:", f"anyflow_runtime.{old}:")
    assert text.count(f"anyflow_runtime.{old}:") == 2 and type(new).from_dict(json.loads(text)) == new


def test_a_moved_class_must_be_the_only_one_of_its_name_in_its_package(monkeypatch):
    package = __name__.partition(".")[0]
    data = {**PetrolConfig().to_dict(), "_target": {"$class": f"{package}.garage:Petrol"}}

    def module_with_another_petrol(name: str) -> None:
        module: Any = types.ModuleType(name)
        module.Petrol = type("Petrol", (), {"__module__": name})
        monkeypatch.setitem(sys.modules, name, module)

    module_with_another_petrol("elsewhere")
    assert PrintableConfig.from_dict(data) == PetrolConfig()
    module_with_another_petrol(f"{package}.shed")
    with pytest.raises(ValueError, match=r"data._target: got '.*garage:Petrol'"):
        PrintableConfig.from_dict(data)


def test_configs_of_models_and_schedulers_are_the_same_read_only_dict():
    config = FlowMapEulerDiscreteScheduler(shift=2.0).config
    assert type(config) is FrozenDict and config.shift == config["shift"] == 2.0
    for change in (setattr, lambda *item: config.update([item[1:]]), lambda *item: delattr(config, item[1])):
        with pytest.raises(TypeError, match="a config cannot change"):
            change(config, "shift", 1.0)
    with pytest.raises(AttributeError, match=r"no entry 'shfit' \(known: .*shift"):
        config.shfit  # noqa: B018
    for duplicate in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(duplicate) is FrozenDict and duplicate == config


@pytest.mark.parametrize("value", [Holder(), Tank()], ids=type)
def test_plain_form_names_what_cannot_be_written(value):
    """Also a dataclass of another kind, which nothing would tell the reader to rebuild."""
    with pytest.raises(TypeError, match=rf"PetrolConfig\.options: {type(value).__name__} has no plain form"):
        PetrolConfig(options=value).to_dict()


@pytest.mark.parametrize(
    "data",
    [
        {"$config": "os:system"},
        {**CarConfig().to_dict(), "dtype": {"$dtype": "save"}},
        {**PetrolConfig().to_dict(), "_target": {"$class": "nowhere:Thing"}},
        PetrolConfig().to_dict(),
    ],
    ids=["no-config", "no-dtype", "no-class", "other-class"],
)
def test_plain_form_of_something_else_is_refused(data):
    with pytest.raises(ValueError, match="data"):
        CarConfig.from_dict(data)
