"""What a user writes: the YAML manifest as frozen values, and errors that name file, line, key and the right word.

`load_manifest` reads and checks the form; what needs the files or the model is checked by `plan.check`.
"""

from pnp_batch.manifest.document import Loc, near_file
from pnp_batch.manifest.inputs import PROMPT_FILES, InputSpec, VideoSpec
from pnp_batch.manifest.quality import QualitySpec, column_of
from pnp_batch.manifest.run import RunSpec, SlurmSpec
from pnp_batch.manifest.settings import (
    AUTHORS_INVERSION_STEPS,
    METHODS_OF,
    GenerateSpec,
    PromptSpec,
    Row,
    Settings,
    means_nothing,
)
from pnp_batch.manifest.whole import Manifest, load_manifest, prompt_from_row, run_from, settings_from

__all__ = [
    "AUTHORS_INVERSION_STEPS",
    "METHODS_OF",
    "PROMPT_FILES",
    "GenerateSpec",
    "InputSpec",
    "Loc",
    "Manifest",
    "PromptSpec",
    "QualitySpec",
    "Row",
    "RunSpec",
    "Settings",
    "SlurmSpec",
    "VideoSpec",
    "column_of",
    "load_manifest",
    "means_nothing",
    "near_file",
    "prompt_from_row",
    "run_from",
    "settings_from",
]
