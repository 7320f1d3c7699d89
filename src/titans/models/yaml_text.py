"""YAML as configurations are written in it: 1e-3 is a number, 010 and 1:30 are no others, and no key is given twice."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as YAML 1.2 and every user do, and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  without octal numbers (010 was 8) and those to the base 60 (1:30 was 90)
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":int", ":float"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        known = set()
        for key, _ in node.value:
            if key.value in known and isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value[:100]!r} is given twice, again in line {line}")
            known.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:binary", yaml.SafeLoader.construct_undefined)  # bytes are no setting
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.?[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


LARGEST = 100_000  # values of a text


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node holds, what an alias stands for counted as often as it is named.

    Raises:
        yaml.YAMLError: more than `LARGEST`, or without end.
    """
    found = known.get(id(node))
    if found is None:
        known[id(node)] = LARGEST + 1  # of a node inside itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inside = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
        found = known[id(node)] = 1 + sum(_size(part, known) for part in inside)
    if found > LARGEST:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1} holds more than {LARGEST:,} values, aliases written out")
    return found


def parse_yaml(text: str) -> Any:
    """The value that a YAML (or JSON) text holds.

    Raises:
        ValueError: it is none, nested too deeply, or too large once every alias is written out; in one line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # the others: a date of month 13, say
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
