"""Types of arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Dtype = Literal["bfloat16", "float32", "float16"]
KVCache = Literal["exact", "int8"]
