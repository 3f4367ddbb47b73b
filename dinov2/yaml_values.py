"""YAML 1.1 without its surprises: a value is what a person means by it, or text, or an error."""

import re
from collections.abc import Mapping
from typing import Any, cast

import yaml
from yaml.constructor import ConstructorError


class YamlError(ValueError):
    """Text that is not one YAML document; the message names the line and what is wrong there."""


_TAG = "tag:yaml.org,2002:"
# Numbers are decimal: `010` is not 8, `1:30` not 90 and `1_0` not 10, all of which are text. `1e-3` is a number.
_RESOLVERS = [
    (f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (f"{_TAG}bool", re.compile(r"(?i:true|false|yes|no|on|off)\Z")),
    (f"{_TAG}int", re.compile(r"[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)\Z")),
    (f"{_TAG}float", re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z")),
    (f"{_TAG}float", re.compile(r"(?i:[-+]?\.inf|\.nan)\Z")),
    (f"{_TAG}merge", re.compile(r"<<\Z")),
]
_COMMENT_WITHOUT_SPACE = re.compile(r"[ \t]+#\S")


class _Loader(yaml.SafeLoader):
    """Resolves as above, and refuses tags, a key given twice and ` #` without a space in what ends a text."""

    yaml_implicit_resolvers = {None: _RESOLVERS}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None):  # `!!int 010` would be 8 again
            raise ConstructorError(None, None, f"tags such as {event.tag} have no meaning here", event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        end = node.end_mark
        plain_text = node.style is None and node.tag == f"{_TAG}str"
        if plain_text and _COMMENT_WITHOUT_SPACE.match(end.buffer, end.pointer):
            advice = "put quotes around the value if # belongs to it, a space after # if a comment begins there"
            raise ConstructorError(None, None, f"{node.value!r} is followed by ' #': {advice}", end)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(str(key.value))
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either `_Loader` or another reader of YAML 1.1 would not read as text."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RESOLVERS}


def parse(text: str) -> Any:
    """The value that a YAML document holds, None if it is empty.

    Raises:
        YamlError: If it is not YAML, gives a key twice, has tags or an alias within what it stands for, or has a value
            that ends in ` #` without a space after it, as names do more often than comments.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_object(node, deep=True)  # deep: nothing contains itself
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise YamlError(f"cannot be read as YAML: {error}") from error
    except RecursionError as error:
        raise YamlError("cannot be read as YAML: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(mapping: Mapping[str, Any]) -> str:
    """A mapping of plain values as a YAML document, in its order; `parse` gives it back."""
    return cast(str, yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
