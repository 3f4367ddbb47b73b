"""YAML 1.1 with strict resolution of values: surprising ones are text or errors."""

import re
from collections.abc import Mapping
from typing import Any, cast

import yaml
from yaml.constructor import ConstructorError


class YamlError(ValueError):
    """Text that is not a YAML document; the message names the line and the problem."""


_TAG = "tag:yaml.org,2002:"
# Numbers are decimal: `010`, `1:30` and `1_0` are text, not 8, 90 and 10. `1e-3` is a number.
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
    """Resolves values as above; rejects tags, duplicate keys, and text that ends in ` #` without a space after it."""

    yaml_implicit_resolvers = {None: _RESOLVERS}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None):  # `!!int 010` would be 8
            raise ConstructorError(None, None, f"tags such as {event.tag} are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        end = node.end_mark
        plain_text = node.style is None and node.tag == f"{_TAG}str"
        if plain_text and _COMMENT_WITHOUT_SPACE.match(end.buffer, end.pointer):
            advice = "quote the value if # belongs to it, or put a space after # if it begins a comment"
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
    """Quotes texts that `_Loader` or other YAML 1.1 parsers would not read as text."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RESOLVERS}


def parse(text: str) -> Any:
    """Parse a YAML document; None if it is empty.

    Raises:
        YamlError: The text is not YAML, has duplicate keys, tags or recursive aliases, or a value that ends in ` #`
            without a space after it, which is rarely meant as a comment.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_object(node, deep=True)  # deep: no recursion
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: numbers of thousands of digits
        raise YamlError(f"cannot be read as YAML: {error}") from error
    except RecursionError as error:
        raise YamlError("cannot be read as YAML: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(mapping: Mapping[str, Any]) -> str:
    """Format a mapping of plain values as a YAML document, in its order; the inverse of `parse`."""
    return cast(str, yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
