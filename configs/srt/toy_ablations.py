"""What the paper's Table 6 takes out of the feedback, on the embedded world: stage 1 alone, each part left out in turn.

    jaxsi bench methods --methods srt --ablations

Hardware of toy.py; an arm is its first stage. Expected: each part left out costs quality, as in the paper, where a 13B
lost 5.1 points of AlpacaEval without feedback, and 4.5 where it learnt from the refinements alone.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config


def configs() -> dict[str, Config]:
    full = dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), dpo=None)
    left_out = {
        "stage 1": (),
        "no score": ("score",),
        "no suggestions": ("suggestions",),
        "no weaknesses": ("weaknesses",),
        "no feedback": ("weaknesses", "suggestions", "score"),
    }
    arms = {name: dataclasses.replace(full, template=full.template.without(*parts)) for name, parts in left_out.items()}
    return arms | {"refinement only": dataclasses.replace(full, refinement_only=True)}
