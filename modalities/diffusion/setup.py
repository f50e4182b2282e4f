"""Everything a diffusion run needs, put together from its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from triptych.modalities.diffusion.data import DataConfig, DiffusionData, View, load_data
from triptych.modalities.diffusion.draws import NoiseConfig, check_times
from triptych.modalities.diffusion.likelihood import (
    INPUT_OF,
    Collator,
    DiffusionBatch,
    ElboLikelihood,
    Kind,
    effective_beta,
)
from triptych.modalities.diffusion.model import (
    ModelConfig,
    adapt,
    family,
    load_denoiser,
    load_scheduler,
    locate,
)
from triptych.modalities.diffusion.persons import UserOff, Users, switch_of
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.rollout import SampleConfig
from triptych.modalities.diffusion.scene import Scene
from triptych.modalities.diffusion.schedule import Schedule, Space, schedule_of
from triptych.objectives import Terms
from triptych.training.config import EvaluationConfig, ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.fit import planned_steps
from triptych.training.logs import Progress
from triptych.training.loop import Task
from triptych.training.order import Draw, key, longest_first, micro_batches, window
from triptych.training.references import (
    AdapterOff,
    Cached,
    FrozenCopy,
    Reference,
    Untrained,
    content_hash,
)
from triptych.training.values import ValueStore


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How likely an image is; see `ElboLikelihood`.

    reduction: 'mean' as every published script has it, with betas of thousands, or the papers' 'sum'. space:
    where errors have constant weight ('native': in what the model predicts). min_snr: gamma, or none.
    zero_terminal_snr: see `schedule_of`.
    """

    reduction: Literal["mean", "sum"] = "mean"
    space: Space = "native"
    min_snr: float | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"likelihood.min_snr={self.min_snr} must be positive; 5 is usual, null is none")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """A whole diffusion run."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    run: RunConfig
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionRun:
    """What `set_up` made: the policy on its way to training, its tasks, and the hash of its base model.

    source: folder or hub name of the model; family: 'sd15', 'sdxl' or 'sd3'. references: those of both
    tasks.
    """

    policy: Denoiser
    source: str
    family: str
    config: DiffusionConfig
    schedule: Schedule
    data: DiffusionData
    references: dict[str, Reference]
    task: Task
    eval_task: Task | None
    base_hash: str

    def scene(self) -> Scene:
        """What its pictures are drawn with: where no size is given, at the resolution of the data."""
        config = self.config
        return Scene(
            policy=self.policy,
            source=self.source,
            family=self.family,
            base_hash=self.base_hash,
            model=config.model,
            sample=config.sample,
            precision=config.optim.precision,
            prompts=tuple(self.data.eval_prompts[: config.sample.num_prompts]),
            resolution=self.data.facts.get("resolution"),
            seed=config.run.seed,
        )


def set_up(
    config: DiffusionConfig,
    terms: Terms,
    *,
    device: torch.device,
    cache_dir: Path,
    root: Path,
    report: Callable[[str], None],
) -> DiffusionRun:
    """Load model and data, check that the objective fits both, and make the references.

    root: folder of the project's own assets. Raises ValueError (DataError among them) in one line for
    anything the user can mend.
    """
    source = locate(config.model, root=root)
    kind_of_model = family(source, revision=config.model.revision)
    schedule = schedule_of(
        load_scheduler(source, config.model),
        prediction=config.model.prediction,
        zero_terminal_snr=config.likelihood.zero_terminal_snr,
    )
    check_times(config.noise, schedule)
    likelihood = ElboLikelihood(
        schedule=schedule,
        reduction=config.likelihood.reduction,
        space=config.likelihood.space,
        min_snr=config.likelihood.min_snr,
        kernel=config.model.kernel,
        baseline=_needs_baseline(terms),
    )
    users = _users(config, kind_of_model)
    data = load_data(config.data, _kinds(terms), seed=config.run.seed, report=report, persons=users)
    if users is not None:
        # Another table is other data.
        data = replace(data, fingerprint=f"{data.fingerprint} {users.fingerprint}")
    check_encoded(data, kind_of_model, source)
    terms.check(INPUT_OF[data.kind], _provided(data, likelihood), bound=True, modality="diffusion")
    report(_beta_line(terms, config, data))
    # Everything that can be refused without the weights has been.
    model = load_denoiser(source, config.model)
    check_sizes(data, model, source)
    base_hash = content_hash(model)
    torch.manual_seed(config.run.seed)
    width = None if users is None else users.width
    policy = Denoiser(adapt(model, config.model, user_width=width)).to(device)
    if users is not None and config.model.persons is not None:
        shown = config.model.persons.shown or (data.held_out or data.train)[0].group
        switch_of(policy).shown = users[str(shown)]
        report(f"persons: {len(users)} with vectors; pictures are drawn for '{shown}'")
    references = _references(config, terms, policy, data, base_hash, cache_dir)
    empty = (data.empty.embeds, data.empty.pooled)
    # Held-out contexts keep their prompts and persons.
    plain = Collator(schedule=schedule, noise=config.noise, users=users)
    forgotten = 0.0 if config.model.persons is None else config.model.persons.dropout
    collate = replace(plain, empty=empty, dropout=config.data.dropout, user_dropout=forgotten)
    held_out = data.held_out
    return DiffusionRun(
        policy=policy,
        source=source,
        family=kind_of_model,
        config=config,
        schedule=schedule,
        data=data,
        references=references,
        task=_task(data, data.train, likelihood, terms, references, collate),
        eval_task=None if held_out is None else _task(data, held_out, likelihood, terms, references, plain),
        base_hash=base_hash,
    )


def fill_references(
    run: DiffusionRun,
    accelerator: Accelerator,
    *,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> None:
    """Compute the values that a cached reference lacks: U numbers for each image that the run will see.

    They belong to the images' times and noise, which are functions of seed, epoch and sample, so the steps of
    the run are gone through as they will come. Each rank fills its share and reads the others'. After it a
    policy that was its own reference is none any more.
    """
    for slot, reference in list(run.references.items()):
        if not isinstance(reference, Cached):
            continue
        rank, num_ranks, computed = accelerator.process_index, accelerator.num_processes, 0
        mine = islice(_batches_to_come(run), rank, None, num_ranks)
        with bar("reference", len(range(rank, _num_batches_to_come(run), num_ranks))) as progress:
            for done, (task, draws) in enumerate(mine, start=1):
                # As in training, data is put together outside of the low precision.
                batch = task.collate([task.examples[d.index] for d in draws], draws)
                with accelerator.autocast():
                    computed += reference.fill(task.likelihood, run.policy, [batch], accelerator.device)
                progress.update(done)
        reference.store.flush()
        accelerator.wait_for_everyone()
        reference.store.refresh()
        if isinstance(reference.source, Untrained):
            run.references[slot] = replace(reference, source=None)
        report(f"reference: {len(reference.store)} cached images at their noise, {computed} computed now")


def _batches_to_come(run: DiffusionRun) -> Iterator[tuple[Task, list[Draw]]]:
    """Every micro-batch of the run and of its held-out evaluation, as one process would cut them."""
    config, task = run.config, run.task
    for step in range(planned_steps(config.optim, len(task.examples))):
        draws = window(
            seed=config.run.seed,
            step=step,
            num_samples=len(task.examples),
            batch_size=config.optim.batch_size,
        )
        for cut in micro_batches(
            draws, task.lengths, rank=0, num_ranks=1, micro_batch_size=config.optim.micro_batch_size
        ):
            yield task, cut
    if run.eval_task is not None:
        for cut in _eval_cuts(run.eval_task, config):
            yield run.eval_task, cut


def _num_batches_to_come(run: DiffusionRun) -> int:
    optim, size = run.config.optim, run.config.evaluation.micro_batch_size
    held_out = 0 if run.eval_task is None else math.ceil(len(run.eval_task.examples) / size)
    steps = planned_steps(optim, len(run.task.examples))
    return steps * math.ceil(optim.batch_size / optim.micro_batch_size) + held_out


def _eval_cuts(task: Task, config: DiffusionConfig) -> Iterator[list[Draw]]:
    """Held-out micro-batches with the randomness that `evaluate` gives them."""
    order, size = longest_first(task.lengths), config.evaluation.micro_batch_size
    for start in range(0, len(order), size):
        yield [Draw(i, -1, key("eval", config.run.seed, i)) for i in order[start : start + size]]


def _users(config: DiffusionConfig, kind_of_model: str) -> Users | None:
    """The table of model.persons, before anything big is loaded."""
    if config.model.persons is None:
        return None
    if kind_of_model == "sd3":
        raise ValueError(
            "model.persons adds to cross-attention, which UNets have (sd15, sdxl); this model is sd3, whose "
            "text and picture share one attention"
        )
    return Users.load(Path(config.model.persons.users))


def _kinds(terms: Terms) -> list[Kind]:
    """Kinds of data that every term takes."""
    kinds = [k for k, made in INPUT_OF.items() if all(made in t.objective.spec.takes for t in terms.terms)]
    if not kinds:
        names = ", ".join(t.objective.spec.name for t in terms.terms)
        raise ValueError(f"no kind of image data is taken by {names}: they need samples or exact log-probs")
    return kinds  # type: ignore[return-value]


def _needs_baseline(terms: Terms) -> bool:
    """Whether a term cannot do without KTO's baseline; others that could read one make their own."""
    return any("baseline" in t.objective.requires for t in terms.terms)


def _provided(data: DiffusionData, likelihood: ElboLikelihood) -> frozenset[str]:
    """Optional fields of the objective's input that this data and likelihood fill."""
    found = {"ref"} | ({"baseline"} if data.kind == "labelled" and likelihood.baseline else set())
    return frozenset(found | data.train.keep)


def check_encoded(data: DiffusionData, kind: str, source: str) -> None:
    """Refuse data that was encoded for another kind of model, before any weight is loaded."""
    encoded = data.facts.get("family")
    if encoded is not None and encoded != kind:
        raise ValueError(
            f"the data was encoded for a model of the kind {encoded}, and {source} is {kind}: encode it "
            "again with scripts/encode_images.py --model.name_or_path"
        )


def check_sizes(data: DiffusionData, model: Any, source: str) -> None:
    """Refuse latents or prompts of other sizes than the model takes: SD 2's data for SD 1.5, say."""
    takes = model.config
    width = takes.get("joint_attention_dim") or takes.get("cross_attention_dim")
    given = (data.shape[0], data.empty.embeds.shape[-1])
    if given != (takes["in_channels"], width):
        raise ValueError(
            f"the data has {given[0]} latent channels and {given[1]} numbers a prompt token, and {source} "
            f"takes {takes['in_channels']} and {width}: encode it again for this model"
        )


def _beta_line(terms: Terms, config: DiffusionConfig, data: DiffusionData) -> str:
    """What beta means at this resolution: the trap that published betas set."""
    objective = terms.main.objective
    if not objective.options.keys() & {"beta", "beta_chosen"}:
        return f"objective: {objective.spec.name}"
    mean, unit = effective_beta(objective.beta, config.likelihood.reduction, data.shape)
    shape = "x".join(map(str, data.shape))
    return (
        f"objective: {objective.spec.name}, beta {mean:g} on the mean of a {shape} latent's "
        f"squared error = {unit:.4g} on its sum"
    )


def _references(
    config: DiffusionConfig,
    terms: Terms,
    policy: Denoiser,
    data: DiffusionData,
    base_hash: str,
    cache_dir: Path,
) -> dict[str, Reference]:
    slots = terms.slots()
    if not slots:
        return {}
    if other := sorted(set(slots) - {"frozen"}):
        raise ValueError(f"reference slot {', '.join(other)} needs stages or rounds; here there is 'frozen'")
    if config.model.reference == "adapter_off":
        frozen: Reference = AdapterOff()
    elif config.model.reference == "user_off":
        frozen = UserOff()
    else:
        # The table is filled before the first step, while the policy is its own reference.
        frozen = Untrained() if config.model.cache_reference else FrozenCopy.of(policy)
    if config.model.cache_reference:
        # What a value depends on besides image, prompt, time and noise. Images and prompts are named by what
        # they were before encoding, so how they were encoded counts, too.
        model, encoded = config.model, (data.fingerprint, config.data.empty_prompt)
        facts = (model.dtype, config.optim.precision, model.prediction, config.likelihood, encoded)
        store = ValueStore(cache_dir / "references" / base_hash[:16])
        frozen = Cached(store, f"{base_hash} {facts}", frozen)
    return {"frozen": frozen}


def _task(
    data: DiffusionData,
    view: View,
    likelihood: ElboLikelihood,
    terms: Terms,
    references: dict[str, Reference],
    collate: Callable[[Sequence, Sequence[Draw]], DiffusionBatch],
) -> Task:
    return Task(
        likelihood=likelihood,
        terms=terms,
        references=references,
        collate=collate,
        examples=view,
        lengths=data.lengths(view),  # type: ignore[arg-type]
        sources=data.sources(view),
    )
