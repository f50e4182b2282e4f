"""Experiments behind EVIDENCE.md: what a paper claims, tried where everything can be computed.

EXPERIMENTS are run by `scripts/evidence.py`; LONG ones train a real model, are run by their own command (or
`--only NAME`) and are reported from their stored results.
"""

EXPERIMENTS: tuple[str, ...] = (
    "cyclic_game",
    "online_ipo",
    "exploration_vpo",
    "coverage_hypo",
    "on_policy_labels",
    "brain_variance",
    "small_identities",
    "tree_ordering",
    "oreo_values",
    "score_credit",
    "pit_gap",
    "diffusion_steps",
    "groupwise_regret",
)
LONG: tuple[str, ...] = (
    "smollm2_online",
    "diffusion_pairs",
    "diffusion_ranked",
    "diffusion_variance",
    "step_aware",
    "persons_ppd",
    "persons_pal",
    "recsys_alignment",
)
