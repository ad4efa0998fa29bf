"""Parts of the feedback left out in turn (the paper's Table 6), on the embedded world; stage 1 alone.

    jaxsi bench methods --methods srt --ablations

Hardware: that of toy.py; each arm is a first stage. Expected: each part left out costs quality, as in the paper. There
a 13B lost 5.1 points of AlpacaEval without feedback, and 4.5 if it learnt only from the refinements.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config, FirstStage
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
    return arms | {"refinement only": dataclasses.replace(full, first_stage=FirstStage(refinement_only=True))}
