"""mkdocstrings takes `Examples:` for a section of code and `Example:` for a box of text: here both are the former."""

import re
from typing import Any

import griffe


class ExamplesSections(griffe.Extension):
    """Renames the section before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
