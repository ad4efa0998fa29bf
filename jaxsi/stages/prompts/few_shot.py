"""The request for a new task after examples, and the parser of the reply."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.stages.prompts import load_template


@stored_as("prompts.few_shot.FewShot")
@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A few-shot request. `template` has the slot `{examples}`; each example stands between `opening` and `closing`,
    its line breaks unchanged. A reply is read by the same marks, so a task may have several paragraphs. If `closing` is
    blank, a task ends where the next `opening` stands, or with the reply. Example: `FewShot(name="list", template="One
    more like these:{examples}", opening="\\n- ", closing="")`.
    """

    name: str
    template: str
    opening: str = "<task>\n"
    closing: str = "\n</task>\n\n"

    def __post_init__(self) -> None:
        if self.template.count("{examples}") != 1:
            raise ValueError(
                f"request {self.name!r}: the template has the slot {{examples}} {self.template.count('{examples}')} "
                "times; it needs it exactly once"
            )
        if not self.opening.strip():
            raise ValueError(f"request {self.name!r}: opening is {self.opening!r}; it needs a visible mark")

    def render(self, examples: Sequence[str]) -> str:
        """The text of the request. Raises: ValueError without examples."""
        if not examples:
            raise ValueError(f"request {self.name!r}: 0 examples; it needs at least 1")
        shown = "".join(f"{self.opening}{example.strip()}{self.closing}" for example in examples)
        return self.template.replace("{examples}", shown.rstrip())

    def parse(self, generated: str, *, cut_off: bool = False) -> str | None:
        """The first task in a generated text; None if no mark shows that the text holds a whole task.

        Args:
          cut_off: the token limit ended the text, so only a mark shows where its task ends.
        """
        closing = self.closing.strip()
        if closing:
            task, end, _ = generated.partition(closing)
            task = task.rpartition(self.opening.strip())[2]
        else:
            body = f"\n{generated.strip()}".removeprefix(self.opening)
            task, end, _ = body.partition(self.opening)
        whole = bool(end) or not (closing or cut_off)
        return (task.strip() or None) if whole else None


def load_few_shot() -> FewShot:
    """The shipped request, in our own words; Self-Instruct (arXiv 2212.10560) numbers its tasks in place of marks."""
    return FewShot(name="self_instruct", template=load_template("self_instruct"))
