"""YAML with line numbers, ``a.b=c`` assignments, and one sentence for every mistake in them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from voltpi.potential.errors import InputError

__all__ = ["KeyPath", "Origins", "assign", "explain", "key_path", "origin_of", "parse_value", "read_yaml"]

KeyPath = tuple[str | int, ...]
Origins = dict[KeyPath, str]


def key_path(key: str) -> KeyPath:
    """``electrodes.0.name`` -> ("electrodes", 0, "name")."""
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def origin_of(origins: Origins, path: KeyPath) -> str:
    """The recorded origin of a key, else of a key below it, else of the nearest key above it."""
    below = [known for known in origins if known[: len(path)] == path]
    if below and path:
        return origins[min(below, key=len)]
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return ""


def _yaml_problem(error: yaml.YAMLError) -> tuple[int | None, str]:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return (None if mark is None else mark.line + 1), " ".join(str(problem).split())


def read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    """The mapping in a YAML file and the line of every key in it.

    Raises InputError where the file is missing, is not YAML, holds a key twice or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such settings file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); give a YAML settings file") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line, problem = _yaml_problem(error)
        place = f"{path}, line {line}" if line else str(path)
        raise InputError(f"{place}: not valid YAML ({problem}); check indentation, colons and brackets") from None
    origins: Origins = {(): str(path)}
    if root is None:
        return {}, origins
    if not isinstance(data, dict):
        raise InputError(f"{path}, line 1: expected 'key: value' pairs such as 'model: water', not {_shown(data)}")
    _note_lines(root, (), str(path), origins)
    return data, origins


def _note_lines(node: yaml.Node, path: KeyPath, file: str, origins: Origins) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if here in origins:
                name = ".".join(map(str, here))
                raise InputError(f"{file}, line {line}: {name} is given twice; keep one of them")
            origins[here] = f"{file}, line {line}"
            _note_lines(value_node, here, file, origins)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            origins[(*path, i)] = f"{file}, line {item.start_mark.line + 1}"
            _note_lines(item, (*path, i), file, origins)


def parse_value(text: Any, origin: str) -> Any:
    """A value as YAML reads it; anything that is not text is taken as it is."""
    if not isinstance(text, str):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"{origin}: '{text}' is not a value ({_yaml_problem(error)[1]}); quote it or check brackets"
        ) from None


def assign(data: dict[str, Any], origins: Origins, key: str, value: Any, origin: str) -> None:
    """Puts ``value`` under the dotted ``key``, making the mappings on the way.

    Raises InputError where the key is empty or leads through something that is not a mapping or a list.
    """
    path = key_path(key)
    if not all(part != "" for part in path):
        raise InputError(f"{origin}: '{key}' is not a key; write it like charges.model")
    here: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            pass
        elif isinstance(here, dict) and isinstance(part, str):
            # a part that is absent or switched off (short_range: none) comes into being when one of its keys is set
            if not last and here.get(part) in (None, "none"):
                here[part] = {}
        else:
            above = ".".join(map(str, path[:depth])) or "settings"
            raise InputError(f"{origin}: there is no {part!s} in {above}; check the key {key}")
        if last:
            here[part] = value
        else:
            here = here[part]
    for known in [p for p in origins if p[: len(path)] == path]:
        del origins[known]
    origins[path] = origin


def explain(error: ValidationError, root: type[BaseModel], origins: Origins) -> str:
    """The first mistake in one sentence with its place, key, value and fix."""
    first = error.errors(include_url=False)[0]
    context: Mapping[str, Any] = first.get("ctx") or {}
    path: KeyPath = tuple(first["loc"])
    kind, value = first["type"], first["input"]
    if kind == "contradiction":
        path = key_path(context["key"]) if "key" in context else path
        prefix = "" if "key" in context else ".".join(map(str, path)) + ": "
        sentence = prefix + first["msg"]
    elif kind == "extra_forbidden":
        sentence = _unknown_key(path, root)
    elif kind == "invalid_key":
        sentence = f"unknown key {value}; keys are words such as model or charges"
    elif kind == "missing":
        sentence = f"{'.'.join(map(str, path))} is missing; add it"
    else:
        # a part read inside a validator reports the path below itself
        sentence = _wrong_value(".".join(map(str, path)), kind, value, first["msg"], context)
    where = origin_of(origins, path)
    rest = error.error_count() - 1
    more = f" (and {rest} more {'mistakes' if rest > 1 else 'mistake'})" if rest else ""
    return (f"{where}: {sentence}" if where else sentence) + more


def _wrong_value(key: str, kind: str, value: Any, message: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        choices = [c.strip().strip("'") for c in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(value), choices, n=1)
        fix = f"did you mean {near[0]}? (one of {' | '.join(choices)})" if near else f"use one of {' | '.join(choices)}"
        return f"{key} is {_shown(value)}; {fix}"
    if kind == "value_error":
        message = str(context["error"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected keys and values below it"
    message = message.replace("Input should be", "it must be")
    return f"{key} is {_shown(value)}; {message[0].lower()}{message[1:]}"


def _unknown_key(path: KeyPath, root: type[BaseModel]) -> str:
    key = ".".join(map(str, path))
    known = _known_keys(root)
    shape = ".".join("#" if isinstance(part, int) else str(part) for part in path)
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
    others = [k for k in known if not shape.startswith(f"{k}.")]  # not what it stands below
    near = elsewhere or difflib.get_close_matches(shape, others, n=1, cutoff=0.6)
    parent = shape.rpartition(".")[0]
    if near and near[0].rpartition(".")[0] == parent:
        # same place: keep list positions as they were given
        return f"unknown key {key}; did you mean {'.'.join([*map(str, path[:-1]), near[0].rpartition('.')[2]])}?"
    if near:
        return f"unknown key {key}; did you mean {near[0]}?"
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    return f"unknown key {key}; the keys here are {', '.join(siblings)}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key below ``model``; ``#`` stands for a position in a list."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        in_list = get_origin(info.annotation) is tuple
        for part in _models_in(info.annotation):
            keys += _known_keys(part, f"{prefix}{name}.#." if in_list else f"{prefix}{name}.")
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may be, also within unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
