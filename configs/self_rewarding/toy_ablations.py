"""Six iterations of Self-Rewarding on the embedded world: does it saturate, collapse or hack its judge?

    jaxsi bench methods --methods self_rewarding --ablations

Hardware: that of toy.py; five minutes for each arm. Every arm has five rounds of DPO in place of two: as it is, with
length control, with early stopping, with both, and stopped by a judge from outside, the exact grader. Expected: quality
peaks at the fourth iteration and then falls, while ties grow and the judge gets worse. The model's own judge does not
see it.

The toy's model cannot compare two responses, so early stopping grades both by the toy's rubric. Its judge is M_{t-1},
and 200 held-out instructions decide.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config, PairConfig
from jaxsi.runs.config_file import load_config
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.toyworld.corpus import RUBRIC
from jaxsi.toyworld.reviser import stopping_prompts
from jaxsi.toyworld.seed_data import exact_judge


def configs() -> dict[str, Config]:
    six = dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), iterations=6)
    controlled = PairConfig(length_control=0.2)
    stop = EarlyStop(prompts=stopping_prompts, rubric=RUBRIC, checkpoints=False)
    return {
        "six iterations": six,
        "six, length control": dataclasses.replace(six, pairs=controlled),
        "six, early stopping": dataclasses.replace(six, early_stop=stop),
        "six, stopped by the grader": dataclasses.replace(
            six, early_stop=dataclasses.replace(stop, judging=exact_judge)
        ),
        "six, both": dataclasses.replace(six, pairs=controlled, early_stop=stop),
    }
