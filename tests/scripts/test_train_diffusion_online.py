"""The path of a user who has prompts and a scorer: draw, judge, learn, be interrupted, export, look."""

import hashlib
import json
import signal
from pathlib import Path

import image_material
import pytest
import torch
import yaml
from image_material import RECIPES, events, weights
from PIL import Image
from tiny_diffusion import denoiser_inputs

from triptych.modalities.diffusion import online as online_module
from triptych.modalities.diffusion.online import OnlineConfig, set_up_online, stages_of
from triptych.modalities.diffusion.policy import Denoiser
from triptych.scripts import train_diffusion_online
from triptych.scripts.common import parse

ONLINE = sorted((RECIPES / "online").glob("*.yaml"))
LIGHT = {
    "name": "pictures",
    "options": {"scorers": {"light": {"scorer": "measure", "options": {"measure": "brightness"}}}},
}
SMALL = {
    "model.dtype": "float32",
    "model.gradient_checkpointing": False,
    "prompts.eval_share": 0.3,
    "sampler.num_steps": 4,
    "sampler.height": None,
    "sampler.width": None,
    "rounds.num_rounds": 2,
    "rounds.num_contexts": 2,
    "optim.batch_size": 2,
    "optim.micro_batch_size": 2,
    "optim.precision": "float32",
    "run.log_every": 1,
    "run.eval_every": 2,
    "run.save_every": 2,
    "sample.num_prompts": 2,
    "sample.num_steps": 2,
    "sample.scorers": {},
}
SPO = {
    "source": {"name": "step_siblings", "options": {"num_candidates": 3, "first_step": 1}},
    "judge": LIGHT,
    "shape": {"name": "pairs"},
    "rounds.num_rounds": 3,
    "optim.lr": 1e-3,
    "sample.measures": ["brightness", "redness"],
}


def family_of(path):
    return next((f for f in ("sd15", "sd3", "sdxl") if f in path.stem), "sdxl")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    for family in ("sd15", "sdxl", "sd3"):
        image_material.write_model(folder / family, family)
    prompts = "\n".join(
        f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "cup", "hat")
    )
    (folder / "prompts.txt").write_text(prompts + "\n")
    return folder


def arguments(material, out, recipe="spo_sdxl", **changes):
    """A command line with the recipe as it is after the changes, by dotted name."""
    config = yaml.safe_load((RECIPES / "online" / f"{recipe}.yaml").read_text())
    family = family_of(Path(recipe))
    places = {
        "model.name_or_path": str(material / family),
        "model.variant": "fp16" if family == "sdxl" else None,
        "prompts.source": str(material / "prompts.txt"),
        "run.output_dir": str(out),
    }
    for name, value in (places | SMALL | changes).items():
        *parents, last = name.split(".")
        at = config
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    material.joinpath("recipes").mkdir(exist_ok=True)
    path = material / "recipes" / f"{hashlib.sha256(repr(config).encode()).hexdigest()[:16]}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def losses(out):
    return [e["loss"] for e in events(out, "train") if "loss" in e]


def run(*args, **changes):
    return train_diffusion_online.main(arguments(*args, **SPO | changes))


def read(path):
    return parse(OnlineConfig, ["--config", str(path)], prog="train_diffusion_online", doc="A recipe.")


@pytest.mark.parametrize("path", ONLINE, ids=lambda p: p.stem)
def test_a_recipe_is_read_as_it_stands_and_its_stages_are_built(path):
    config = read(path)
    (stage,) = stages_of(config)
    assert stage.num_rounds == config.rounds.num_rounds
    assert config.run.output_dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")
    assert "arXiv" in path.read_text()


@pytest.mark.parametrize("path", ONLINE, ids=lambda p: p.stem)
def test_a_recipe_trains_a_tiny_model_of_its_family(path, material, tmp_path):
    config = read(path)
    options = dict(config.source.options) | {"num_candidates": 2, "last_step": 3}
    if config.source.name == "step_siblings":
        options |= {"first_step": 1, "segment": min(2, options.get("segment", 1))}
    changes = {"source": {"name": config.source.name, "options": options}, "judge": LIGHT}
    if config.shape.name == "pairs":
        changes["shape"] = {"name": "pairs"}
    out = tmp_path / "run"
    name = path.stem
    assert train_diffusion_online.main(arguments(material, out, name, **changes)) == 0
    assert losses(out)
    if "spo" in name or "lpo" in name or "d3po" in name:
        # The policy is the reference at the first step.
        assert losses(out)[0] == pytest.approx(0.693147, abs=1e-4)
    assert (out / "report.html").is_file()


def test_a_run_goes_from_prompts_to_a_report(material, tmp_path):
    out = tmp_path / "run"
    assert run(material, out) == 0
    assert len(losses(out)) == 9  # three rounds of 2 prompts x 3 steps, two pairs a step
    rounds = [e for e in events(out, "train") if "round/groups" in e]
    assert [e["step"] for e in rounds] == [1, 4, 7]
    assert all(e["round/score/light"] == pytest.approx(e["reward"]) for e in rounds)
    assert all(e["reward_best"] > e["reward"] for e in rounds)
    looks = events(out, "eval")
    assert looks[0]["drift"] == 0
    assert looks[-1]["drift"] > 0
    results = json.loads((out / "results.json").read_text())
    assert {"brightness, aligned - base", "redness, aligned - base", "diversity, aligned - base"} == set(
        results
    )
    assert (out / "model" / "pytorch_lora_weights.safetensors").is_file()
    assert (out / "model" / "README.md").read_text().startswith("---")
    assert "<script" not in (out / "report.html").read_text()
    with Image.open(out / "samples" / "step-000002" / "grid.png") as sheet:
        assert sheet.width > 64
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


class Stopping:
    """A signal that comes after so many steps."""

    number = signal.SIGTERM

    def __init__(self, at):
        self.at, self.asked = at, 0

    def __call__(self):
        self.asked += 1
        return self.asked == self.at


@pytest.mark.parametrize("case", ["pairs", "policy gradient with exact KL"])
def test_a_run_stopped_in_the_middle_of_a_round_goes_on_to_the_same_end(
    case, material, tmp_path, monkeypatch
):
    changes = {"rounds.num_rounds": 2}
    if case != "pairs":
        changes |= {
            "source": {"name": "denoising_paths", "options": {"num_candidates": 2, "split": True}},
            "shape": {"name": "auto"},
            "objective": {
                "name": "grpo",
                "options": {"clip": 1e-4},
                "regularizers": [{"name": "kl_exact", "weight": 0.1, "reference": "none"}],
            },
        }
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(material, whole, **changes) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train_diffusion_online, "StopSignal", lambda: Stopping(4))
        assert run(material, out, **changes) == 128 + signal.SIGTERM
    assert not (out / "model").exists()
    assert run(material, out, **changes) == 0
    assert losses(out) == losses(whole)
    last = len(losses(whole))
    assert weights(out, last) == weights(whole, last)
    assert last >= 6
    # The interrupted round was not drawn again.
    assert len([e for e in events(out, "train") if "round/groups" in e]) == 2


def set_up(material, out, **changes):
    config = parse(
        OnlineConfig,
        arguments(material, out, **SPO | changes),
        prog="train_diffusion_online",
        doc="A recipe.",
    )
    return config, set_up_online(
        config, stages_of(config), device=torch.device("cpu"), root=out, report=lambda line: None
    )


def test_a_pair_costs_one_forward_of_the_policy_and_one_of_the_reference(material, tmp_path, monkeypatch):
    """Of one row each, and two with guidance: both siblings leave one state."""
    calls = []
    predict = Denoiser._predict

    def counted(self, noisy, *rest):
        calls.append((len(noisy), torch.is_grad_enabled()))
        return predict(self, noisy, *rest)

    monkeypatch.setattr(Denoiser, "_predict", counted)
    for guidance, rows in ((1.0, 1), (5.0, 2)):
        calls.clear()
        changes = {"sampler.guidance": guidance, "sample.num_prompts": 0, "rounds.num_rounds": 1}
        assert run(material, tmp_path / str(guidance), **changes, **{"optim.batch_size": 1}) == 0
        # 2 prompts x 3 steps are 6 pairs, one a step of the optimizer.
        assert [n for n, training in calls if training] == [rows] * 6
        references = [n for n, training in calls if not training]
        # Drawing: the state before siblings, the first with them, then 3 siblings of 2 prompts twice.
        drawing = 2 * (1 + 1 + 3 + 3)
        assert sum(references) == rows * (drawing + 6)


def test_gradients_are_really_clipped(material, tmp_path):
    norms = {}
    for bound in (1e-6, 1e6):
        out = tmp_path / str(bound)
        assert run(material, out, **{"optim.max_grad_norm": bound, "sample.num_prompts": 0}) == 0
        norms[bound] = [e["grad_norm"] for e in events(out, "train") if "grad_norm" in e]
    assert norms[1e-6][0] == norms[1e6][0] > 1e-6
    assert weights(tmp_path / "1e-06", 9) != weights(tmp_path / "1000000.0", 9)


def test_prompts_are_embedded_once_as_the_pipeline_embeds_them(material, tmp_path):
    config, made = set_up(material, tmp_path)
    pipeline, embedded = made.studio.open()
    assert pipeline.text_encoder is None
    assert len(made.rounds.contexts) == 4
    assert len(embedded) == 2
    context = made.rounds.contexts[0]
    fresh = online_module.load_pipeline(str(material / "sdxl"), config.model)
    expected = fresh.encode_prompt(prompt=context.text, device="cpu", do_classifier_free_guidance=True)
    own = made.port.prompts[context.key]
    torch.testing.assert_close(own.embeds, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(own.pooled, expected[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(made.port.empty[0], expected[1][0], rtol=0, atol=0)
    assert own.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]]
    # What the policy sees of it is what the pipeline would give it.
    inputs = denoiser_inputs("sdxl", batch=1)
    with torch.no_grad():
        seen = made.policy([inputs["sample"]], [torch.tensor([7.0])], [own])[0]
    assert seen.shape == (1, *made.port.shape)


def test_the_sampler_is_that_of_the_models_family(material, tmp_path):
    for recipe, kind, shape in (("spo_sdxl", "Ddim", "pairs"), ("flow_grpo_sd3", "FlowSde", "auto")):
        args = arguments(
            material,
            tmp_path,
            recipe,
            **{"judge": LIGHT, "source": {"name": "denoising_paths"}, "shape": {"name": shape}},
        )
        config = parse(OnlineConfig, args, prog="x", doc="x")
        made = set_up_online(
            config, stages_of(config), device=torch.device("cpu"), root=tmp_path, report=lambda line: None
        )
        assert type(made.port.likelihood.rule).__name__ == kind
        assert len(made.port.grid.times) == 4


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prompts.source": "none.txt"}, "none.txt: there is no such file of prompts"),
        ({"prompts.eval_share": 0}, "no prompt is held out for pictures"),
        ({"judge": {"name": "pictur"}}, "Did you mean 'pictures'"),
        ({"objective": {"name": "dpo", "options": {"betta": 1}}}, "betta"),
        ({"optim.num_steps": 3}, "rounds.num_rounds and rounds.num_epochs decide on the length"),
        ({"sampler.eta": 0}, "deterministic"),
        ({"rounds.num_contexts": 5}, "num_contexts=5 a round, and there are 4"),
        (
            {"source": {"name": "step_siblings", "options": {"first_step": 0, "segment": 3}}},
            "segment=3 does not",
        ),
        (
            {"source": '{"name": "step_siblings", "options": {"num_steps": 7}}'},
            "num_steps=7, but the sampler",
        ),
    ],
)
def test_a_users_mistake_ends_in_one_line(material, tmp_path, capsys, changes, part):
    with pytest.raises(SystemExit) as left:
        run(material, tmp_path / "run", **changes)
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert part in said


def test_json_lines_of_prompts_are_read_and_a_bad_line_is_named(tmp_path):
    from triptych.modalities.diffusion.prompts import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n\n{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_text('{"prompt": "a cat"}\n{"caption": "a dog"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: no JSON object with a field 'prompt'"):
        read_prompts(path)
    path.write_text('{"prompt": 3}\n')
    with pytest.raises(ValueError, match="prompt is int"):
        read_prompts(path)
