"""`FlowMapEulerDiscreteScheduler` against the diffusers class it replaces (witness: diffusers 0.42), bit for bit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch

from anyflow_runtime.schedulers import FlowMapEulerDiscreteScheduler as Ours

diffusers = pytest.importorskip("diffusers")
Theirs = diffusers.FlowMapEulerDiscreteScheduler

SCHEDULES = [
    {"num_inference_steps": 1},
    {"num_inference_steps": 4},
    {"num_inference_steps": 7, "device": "cpu"},
    {"sigmas": [1.0, 0.75, 0.5, 0.1]},
    {"num_inference_steps": 3, "timesteps": [999.0, 500.5, 20.0]},
    {"sigmas": [0.9, 0.4], "timesteps": [900.0, 1.0]},
    {"sigmas": torch.tensor([0.8, 0.3])},
]


def both(shift=5.0, num_train_timesteps=1000, **schedule):
    pair = Ours(num_train_timesteps, shift), Theirs(num_train_timesteps, shift)
    for scheduler in pair if schedule else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers copies a tensor of sigmas with a warning
            scheduler.set_timesteps(**schedule)
    return pair


def latents(dtype=torch.float32, shape=(2, 3, 4, 2, 2)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedule_is_bitwise_that_of_diffusers(schedule, shift):
    ours, theirs = both(shift, **schedule)
    for name in ("sigmas", "timesteps"):
        mine, reference = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == reference.dtype == torch.float64 and torch.equal(mine, reference), name
    assert ours.num_inference_steps == theirs.num_inference_steps and ours.order == theirs.order
    assert ours.step_index is None and ours.begin_index is None


def test_constructor_sets_the_training_schedule():
    ours, theirs = both(3.0, 50)
    assert torch.equal(ours.sigmas, theirs.sigmas) and len(ours.timesteps) == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rollout_is_bitwise_that_of_diffusers(schedule, dtype):
    ours, theirs = both(**schedule)
    x = y = latents(dtype)[0]
    for t in ours.timesteps:
        x = ours.step(torch.sin(x), t, x).prev_sample
        y = theirs.step(torch.sin(y), t, y, return_dict=False)[0]
        assert x.dtype == dtype and torch.equal(x, y)
    assert ours.step_index == theirs.step_index == len(ours.timesteps)


@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_has_the_dtype_of_the_model_output(sample_dtype):
    ours, theirs = both(num_inference_steps=4)
    sample, flow = latents()[0].to(sample_dtype), latents(torch.bfloat16)[1]
    x = ours.step(flow, ours.timesteps[1], sample).prev_sample
    assert x.dtype == torch.bfloat16 and torch.equal(x, theirs.step(flow, ours.timesteps[1], sample).prev_sample)


ANY_STEP = [
    (1000.0, 0.0),
    (873.21, 12.5),
    (500, 250),
    (torch.tensor(640.3), torch.tensor(77.7, dtype=torch.float64)),
    (torch.tensor([640.3, 320.1]), torch.tensor([77.7, 20.5])),
    (torch.tensor([1000.0, 1000.0]), torch.tensor([640.0, 0.3])),
    (torch.tensor(700, dtype=torch.int64), 700.0),
    (torch.rand(2, 3) * 400 + 500, torch.rand(2, 3) * 400),
    (100.0, 900.0),
]


@pytest.mark.parametrize(("t", "r"), ANY_STEP, ids=str)
def test_off_schedule_steps_are_those_of_diffusers(t, r):
    ours, theirs = both(num_inference_steps=4)
    sample, flow = latents()
    assert torch.equal(ours.step(flow, t, sample, r).prev_sample, theirs.step(flow, t, sample, r).prev_sample)


def test_equal_t_and_r_change_nothing():
    ours, _ = both(num_inference_steps=4)
    sample, flow = latents()
    assert torch.equal(ours.step(flow, ours.timesteps[1], sample, ours.timesteps[1]).prev_sample, sample)


def test_timesteps_of_a_batch_are_read_one_by_one():
    """diffusers takes the sigma of the first for all as soon as that one is on the schedule."""
    ours, _ = both(num_inference_steps=4)
    sample, flow = latents(torch.float64)
    t, r = torch.stack([ours.timesteps[0], ours.timesteps[2]]), torch.tensor([300.0, 200.0])
    got = ours.step(flow, t, sample, r).prev_sample
    each = [ours.step(flow[i], t[i], sample[i], r[i]).prev_sample for i in range(2)]
    assert torch.equal(got, torch.stack(each))
    following = ours.step(flow, t, sample).prev_sample
    assert torch.equal(following[1], ours.step(flow[1], t[1], sample[1]).prev_sample)


@pytest.mark.parametrize(
    "value", [1000.0, 1000.0009, 1000.002, 937.5, 937.4995, 3.0, torch.tensor([937.5, 4.0])], ids=str
)
def test_index_for_timestep_is_that_of_diffusers(value):
    ours, theirs = both(num_inference_steps=4)
    assert ours.index_for_timestep(value) == theirs.index_for_timestep(value)


def test_lookup_follows_timesteps_assigned_or_written_by_the_caller():
    ours, _ = both(num_inference_steps=4)
    ours.timesteps = torch.tensor([800.0, 400.0])
    assert (ours.index_for_timestep(400.0), ours.index_for_timestep(1000.0)) == (1, None)
    ours.timesteps[1] = 300.0
    assert (ours.index_for_timestep(300.0), ours.index_for_timestep(400.0)) == (1, None)


def test_begin_index_starts_the_step_counter():
    ours, theirs = both(num_inference_steps=4)
    sample, flow = latents()
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(2)
        scheduler.step(flow, scheduler.timesteps[2], sample)
    assert ours.step_index == theirs.step_index == 3 and ours.begin_index == theirs.begin_index == 2
    ours.set_timesteps(4)
    assert ours.step_index is None and ours.begin_index is None


@pytest.mark.parametrize("t", [900.0, 3.3], ids=["on-row", "off-row"])
def test_step_counter_starts_at_the_row_of_the_first_timestep(t):
    ours, theirs = both(timesteps=[1000.0, 643.0, 5.0], shift=1.0)
    sample, flow = latents()
    for scheduler in (ours, theirs):
        scheduler.step(flow, scheduler.timesteps[1] if t > 500 else t, sample, 0.0)
    assert ours.step_index == theirs.step_index == (2 if t > 500 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [torch.tensor(730.0), torch.tensor([10.0, 730.0]), torch.rand(2, 3) * 1000], ids=str)
def test_scale_noise_is_that_of_diffusers(t, dtype):
    ours, theirs = both()
    sample, noise = latents(dtype)
    assert torch.equal(ours.scale_noise(sample, t, noise), theirs.scale_noise(sample, t, noise))


def test_scale_model_input_and_apply_shift():
    ours, theirs = both(3.0)
    x = torch.rand(5)
    assert ours.scale_model_input(x, 3) is x and torch.equal(ours.apply_shift(x), theirs.apply_shift(x))


def test_output_is_had_by_attribute_name_position_and_tuple():
    ours, _ = both(num_inference_steps=2)
    sample, flow = latents()
    out, (bare,) = ours.step(flow, 1000.0, sample), ours.step(flow, 1000.0, sample, return_dict=False)
    assert out["prev_sample"] is out[0] is out.to_tuple()[0] is out.prev_sample and torch.equal(out.prev_sample, bare)


def step_with(scheduler, t, r=None, flow_shape=(1, 2)):
    return scheduler.step(torch.zeros(flow_shape), t, torch.zeros(1, 2), r)


ERRORS = {
    "neither": (lambda s: s.set_timesteps(), "must be provided"),
    "two-lengths": (lambda s: s.set_timesteps(sigmas=[1.0], timesteps=[1.0, 2.0]), "same length"),
    "count": (lambda s: s.set_timesteps(3, sigmas=[1.0]), "same length as `num_inference_steps`"),
    "off-schedule": (lambda s: step_with(s, 123.4), "pass an explicit `r_timestep`"),
}


@pytest.mark.parametrize("kind", ["ours", "theirs"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_errors_are_those_of_diffusers(error, kind):
    call, message = error
    with pytest.raises(ValueError, match=message):
        call(both(num_inference_steps=4)[kind == "theirs"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_timesteps(0), "num_inference_steps: got 0, expected at least 1"),
        (lambda s: step_with(s, 1000.0, flow_shape=(1, 3)), r"model_output: got \(1, 3\), .*\(1, 2\)"),
        (lambda s: s.scale_noise(torch.zeros(2), torch.tensor(1.0)), "noise: "),
        (lambda s: Ours(shift=0.0), "shift: got 0.0, expected a positive number"),
        (lambda s: Ours.from_config("path"), "from_pretrained"),
        (lambda s: s.save_pretrained("x", push_to_hub=True), "push_to_hub"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(both(num_inference_steps=4)[0])


def test_a_failed_step_does_not_move_the_counter():
    ours, _ = both(num_inference_steps=4)
    with pytest.raises(ValueError, match="r_timestep"):
        step_with(ours, 123.4)
    assert ours.step_index is None


def test_unset_schedule_is_an_error():
    ours, _ = both(num_inference_steps=4)
    ours.timesteps = None
    assert ours.index_for_timestep(3.0) is None
    with pytest.raises(ValueError, match="set_timesteps"):
        step_with(ours, 1000.0)


def test_rows_of_the_schedule_are_found_without_reading_the_device():
    """On the meta device no value can be read at all, so a lookup there proves that the host copy serves it."""
    ours, _ = both(num_inference_steps=5)
    ours.set_timesteps(5, device="meta")
    assert [ours.index_for_timestep(t) for t in ours.timesteps] == [0, 1, 2, 3, 4]
    assert ours.index_for_timestep(ours.timesteps[1:][2]) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_rollout_on_a_gpu_never_waits_for_it():
    ours, theirs = both()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4, device="cuda")
    x = y = latents(torch.bfloat16)[0].cuda()
    rows = ours.timesteps.unbind()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in rows:
            x = ours.step(torch.sin(x), t, x).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for t in rows:
        y = theirs.step(torch.sin(y), t, y).prev_sample
    assert torch.equal(x, y)


def test_works_under_inference_mode():
    with torch.inference_mode():
        ours, theirs = both(num_inference_steps=3)
        sample, flow = latents()
        t = ours.timesteps[1]
        assert torch.equal(ours.step(flow, t, sample).prev_sample, theirs.step(flow, t, sample).prev_sample)


def test_config_files_are_read_both_ways(tmp_path):
    Ours(500, 3.0).save_pretrained(tmp_path / "a" / "scheduler")
    read = Theirs.from_pretrained(tmp_path / "a", subfolder="scheduler")
    assert (read.config.num_train_timesteps, read.config.shift) == (500, 3.0)
    Theirs(200, 7.0).save_pretrained(tmp_path / "b")
    mine = Ours.from_pretrained(tmp_path / "b")
    assert (mine.config.num_train_timesteps, mine.config["shift"]) == (200, 7.0) and len(mine.timesteps) == 200
    written = json.loads((tmp_path / "a" / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "FlowMapEulerDiscreteScheduler" == mine.config["_class_name"]


def test_from_config_accepts_diffusers_schedulers_and_is_accepted_by_them():
    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0, base_shift=0.7)
    assert Ours.from_config(other.config).config.shift == 4.0
    assert Ours.from_config(other.config).config.base_shift == 0.7
    assert Theirs.from_config(Ours(shift=6.0).config).config.shift == 6.0
    changed, unused = Ours.from_config(Ours(shift=6.0).config, return_unused_kwargs=True, shift=2.0, colour=1)
    assert changed.config.shift == 2.0 and unused == {"colour": 1}


def test_config_is_read_only_and_the_scheduler_pickles():
    ours = Ours(shift=2.0)
    for change in (lambda c: setattr(c, "shift", 1.0), lambda c: c.update(shift=1.0), lambda c: c.pop("shift")):
        with pytest.raises(TypeError, match="from_config"):
            change(ours.config)
    with pytest.raises(AttributeError, match="colour"):
        _ = ours.config.colour
    copied = pickle.loads(pickle.dumps(ours))
    assert copied.config == ours.config and torch.equal(copied.sigmas, ours.sigmas)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(OSError, match=r"scheduler_config\.json"):
        Ours.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        Ours.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        Ours.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="directory"):
        Ours().save_pretrained(tmp_path / "scheduler_config.json")


def test_a_hub_name_is_fetched_with_its_options(tmp_path, monkeypatch):
    Ours(shift=9.0).save_pretrained(tmp_path)
    asked = []

    def fetch(repo, filename, **options):
        asked.append((repo, filename, options))
        return str(tmp_path / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=fetch))
    ours = Ours.from_pretrained("nobody/model", subfolder="scheduler", revision="main")
    assert ours.config.shift == 9.0
    assert asked == [("nobody/model", "scheduler_config.json", {"subfolder": "scheduler", "revision": "main"})]


def test_a_diffusers_pipeline_saves_and_loads_it(tmp_path):
    pipe = diffusers.AnyFlowPipeline(None, None, None, None, Theirs(shift=5.0))
    pipe.scheduler = Ours.from_config(pipe.scheduler.config)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    assert isinstance(pipe.scheduler, diffusers.SchedulerMixin) and pipe.scheduler.config.shift == 5.0
    pipe.save_pretrained(tmp_path / "pipe")
    assert Theirs.from_pretrained(tmp_path / "pipe", subfolder="scheduler").config.shift == 5.0


def tiny_pipeline(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.AnyFlowTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.AnyFlowPipeline(None, None, transformer, vae, scheduler)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_diffusers_pipeline_makes_the_same_video_with_it(steps):
    videos = []
    for scheduler in (Theirs(shift=5.0), Ours(shift=5.0)):
        pipe = tiny_pipeline(scheduler)
        pipe.set_progress_bar_config(disable=True)
        text = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
        videos.append(
            pipe(
                prompt_embeds=text, height=16, width=16, num_frames=5, num_inference_steps=steps, guidance_scale=1.0,
                generator=torch.Generator().manual_seed(2), output_type="latent",
            ).frames
        )  # fmt: skip
    assert torch.equal(videos[0], videos[1]) and videos[0].isfinite().all()


def test_works_where_diffusers_is_not_installed(tmp_path):
    program = f"""
import sys
sys.modules["diffusers"] = None
import torch
from anyflow_runtime.schedulers import FlowMapEulerDiscreteScheduler as S
s = S(shift=5.0)
s.save_pretrained({str(tmp_path)!r})
s = S.from_pretrained({str(tmp_path)!r})
s.set_timesteps(2)
x = torch.ones(1, 2)
print(s.step(x, s.timesteps[1], x).prev_sample.tolist(), s.config.shift, [m for m in sys.modules if "diffusers." in m])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[[0.1666666716337204, 0.1666666716337204]] 5.0 []"
    assert Theirs.from_pretrained(tmp_path).config.shift == 5.0
