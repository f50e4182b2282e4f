"""What each process of a group does for `test_sharded_training`, in a module that they can import."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from toy import Silent, cpu_accelerator

from triptych.modalities.recsys.data import DataConfig
from triptych.modalities.recsys.model import ModelConfig
from triptych.modalities.recsys.ranked import RankingConfig
from triptych.modalities.recsys.setup import IdsConfig, RecsysConfig, TablesConfig, set_up
from triptych.modalities.recsys.sharded_run import sharing, whole_run, whole_validation
from triptych.modalities.recsys.tokenise import TokeniseConfig
from triptych.scripts import train_recsys
from triptych.scripts.common import as_dict
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.fit import Hooks, fit
from triptych.training.loop import NonFiniteError, make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.quarantine import Quarantine
from triptych.training.references import trained

NUM_STEPS, HALF = 6, 3
OVERRIDE = ["tables", "num_ranks"]


def write_events(path, *, users=14, items=15):
    """Users who walk in steps of one along a circle of items of three genres."""
    choice = random.Random(0)
    lines = ["user,item,timestamp,genre"]
    for u in range(users):
        start, length = choice.randrange(items), choice.randint(6, 9)
        for t in range(length):
            item = (start + t) % items
            lines.append(f"p{u},film {item},{t},g{item % 3}")
    path.write_text("\n".join(lines) + "\n")
    return path


def configured(folder, events, *, tables=None, model=None, optim=None, run=None):
    """A small run of six steps whose items, users and genres have vectors of their own."""
    settings = {
        "context": "causal",
        "encoder_layers": 1,
        "decoder_layers": 1,
        "width": 8,
        "heads": 2,
        "dropout": 0.0,
        "kernel": "reference",
        "item_vectors": True,
        "user_vectors": True,
        "item_features": ["genre"],
        "tables": "torchrec",
    }
    # A large eps: where gradients are rounding errors alone, Adam would make steps of them.
    steps = {"lr": 0.02, "batch_size": 5, "micro_batch_size": 5, "num_steps": NUM_STEPS, "eps": 0.01}
    return RecsysConfig(
        data=DataConfig(source=str(events), item_features=["genre"]),
        model=ModelConfig(**(settings | (model or {}))),
        objective=ObjectiveConfig(name="sft", options={"reduce": "sum"}, reference="none"),
        optim=OptimConfig(**(steps | {"max_grad_norm": 0.5} | (optim or {}))),
        run=RunConfig(**({"output_dir": str(folder), "save_every": HALF} | (run or {}))),
        ids=IdsConfig(make=TokeniseConfig(dim=4, levels=2, codebook_size=4)),
        tables=tables,
        evaluation=RankingConfig(width=15, ks=[3], bars=[], shown=0),
    )


def begun(config, accelerator, report=lambda line: None):
    """What the script makes before it trains: the run and its learner."""
    share = sharing(config, accelerator)
    made = set_up(
        config,
        config.objective.terms(),
        device=accelerator.device,
        quarantine=Quarantine(None),
        report=report,
    )
    return made, make_learner(made.policy, config.optim, accelerator, share=share)


def trained_run(config):
    """A run as the script makes one, without its report: made, learner, and the lines that it said."""
    accelerator, lines = cpu_accelerator(), []
    made, learner = begun(config, accelerator, lines.append)
    hooks = Hooks(
        evaluate=whole_validation(made, config, learner) if config.run.eval_every else None,
        stop=lambda: False,
        report=lines.append,
        progress=lambda total, start: Silent(),
    )
    identity = {"tables": str(config.tables), "num_ranks": accelerator.num_processes}
    fit(made.task, learner, config.optim, config.run, accelerator, identity=identity, hooks=hooks)
    return made, learner, lines


def half_of(source, folder):
    """A folder with the first checkpoint of a run alone."""
    step = f"checkpoints/step-{HALF:08d}"
    shutil.copytree(Path(source) / step, Path(folder) / step)
    return folder


class Spoilt:
    """A likelihood of which one user's session has a NaN: in its value, or in its gradient alone."""

    def __init__(self, plain, user, where):
        self.plain, self.user, self.where = plain, user, where

    def __call__(self, policy, batch, generator=None):
        terms = self.plain.terms(policy, batch, generator)
        if self.user in batch.ids:
            # The square root of 0 times 0 is 0 with a gradient of 0 times infinity.
            terms = terms * torch.nan if self.where == "loss" else terms + (0 * terms).sqrt()
        return self.plain.assemble(terms, batch)

    def assemble(self, terms, batch):
        return self.plain.assemble(terms, batch)


def spoilt(config, where):
    """Message of a step with one bad user on one rank, and which weights moved."""
    accelerator = cpu_accelerator()
    made, learner = begun(config, accelerator)
    made_of = replace(made.task, likelihood=Spoilt(made.task.likelihood, made.task.examples[0].id, where))
    before = learner.fused.weights()
    dense = {name: p.detach().clone() for name, p in learner.named.items()}
    try:
        for _ in range(NUM_STEPS):
            train_step(
                made_of,
                learner,
                config.optim,
                accelerator,
                seed=0,
                num_steps=NUM_STEPS,
                meter=Meter(accelerator.device),
            )
            before = learner.fused.weights()
            dense = {name: p.detach().clone() for name, p in learner.named.items()}
        message = "no error"
    except NonFiniteError as error:
        message = str(error)
    after = learner.fused.weights()
    return {
        "message": message,
        "tables": any(not torch.equal(before[n], after[n]) for n in before),
        "dense": any(not torch.equal(dense[n], p) for n, p in learner.named.items()),
    }


def everything(folder, events):
    """All that two processes do, in one group: starting one costs more than the work."""
    torch.set_num_threads(1)
    folder = Path(folder)
    rank, found = cpu_accelerator().process_index, {}

    def keep(name, config):
        made, learner, lines = trained_run(config)
        found[f"lines {name}"] = lines
        found["dense"] = [*learner.fused.dense]
        whole = whole_run(made, config, learner)
        if rank == 0:
            save_file(trained(whole.policy), folder / f"{name}.safetensors")
        else:
            assert whole is made

    keep("sgd", configured(folder / "sgd", events, tables=TablesConfig(optimizer="sgd", lr=0.1)))
    options = {"model": {"dropout": 0.2}, "run": {"save_every": HALF, "eval_every": HALF}}
    keep("default", configured(folder / "default", events, **options))
    if rank == 0:
        half_of(folder / "default", folder / "halves")
        shutil.copy(folder / "default" / "metrics.jsonl", folder / "halves")
    torch.distributed.barrier()
    keep("halves", configured(folder / "halves", events, **options))
    if rank == 0:
        half_of(folder / "one", folder / "from one")
    torch.distributed.barrier()
    keep("from one", configured(folder / "from one", events, run={"resume_override": OVERRIDE}))
    for where in ("loss", "gradient"):
        found[where] = spoilt(configured(folder / "none", events), where)
    (folder / f"rank {rank}.json").write_text(json.dumps(found))


def scripted(folder, events):
    """The script itself, from its command line on."""
    torch.set_num_threads(1)
    config = configured(folder, events)
    path = Path(f"{folder} {os.environ['RANK']}.yaml")
    path.write_text(yaml.safe_dump(as_dict(config)))
    assert train_recsys.main(["--config", str(path)]) == 0
