"""Every source and judge of text rounds by name: what a recipe may say."""

from triptych.modalities.llm import reward_judges, tree_source, turn_judges
from triptych.modalities.llm.judges import JUDGES
from triptych.modalities.llm.sources import SOURCES
from triptych.training.round_recipes import Plugs

# Importing these adds their names to the registries, which they cannot be imported by.
REGISTERED_HERE = (reward_judges, tree_source, turn_judges)

PLUGS = Plugs(modality="llm", sources=SOURCES, judges=JUDGES)

__all__ = ["JUDGES", "PLUGS", "REGISTERED_HERE", "SOURCES"]
