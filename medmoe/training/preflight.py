# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Checks of a bundle before anything is built: misspelt overrides, settings out of range, paths that do not exist.

MONAI creates a new key for an override that matches nothing, and starts the run with the default. Here a key that
nothing in the configuration reads is an error that names the nearest one.
"""

from __future__ import annotations

import inspect
import os
import pydoc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from monai.bundle import (
    ConfigComponent,
    ConfigExpression,
    ConfigParser,
    ConfigWorkflow,
    ReferenceResolver,
    create_workflow,
)
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties
from monai.bundle.utils import ID_SEP_KEY as SEP

from medmoe.errors import ConfigError
from medmoe.training import excepthook
from medmoe.training.settings import EXPERTS, RULES, nearest, problems

T = TypeVar("T")

Kind = Literal["train", "evaluate", "inference"]
PATHS: Mapping[str, tuple[str, ...]] = {
    "train": ("dataset_dir",),
    "evaluate": ("dataset_dir", "checkpoint"),
    "inference": ("input", "checkpoint"),
}
OPTIONAL: Mapping[str, tuple[str, ...]] = {"inference": ("table", "condition_dir")}
"""Paths that have to exist where they are given. In training a table counts from the data set's folder."""
WEIGHTS = tuple(f"{name}_weights" for name in EXPERTS)
ADVICE: Mapping[str, str] = {
    "dataset_dir": "Give --dataset_dir DIR, or make it with a script of data_scripts (demo_data: mni152_tissue.py)",
    "checkpoint": "Train first, or give --checkpoint FILE (or the --output_dir of the training run)",
    **{name: "Give a file, 'random', or nothing for the cache" for name in WEIGHTS},
    "table": "Give a CSV file with a row for each input, or nothing",
    "condition_dir": "Give a folder with the second images, called like the inputs, or nothing",
    "input": "Give --input with an image, a folder of images or a DICOM series",
}


def preflight(kind: Kind = "train", paths: Sequence[str] | None = None, known: Sequence[str] = ()) -> None:
    """To be the first expression of a bundle's ``initialize`` list.

    It also makes the process end with ``Error: ...`` and status 2, without a traceback, on any ``MedMoEError``.

    Args:
        kind: ``"train"``, ``"evaluate"`` or ``"inference"``: which paths have to exist.
        paths: names of the settings whose paths have to exist, in place of those that ``kind`` implies.
        known: ids (``resume``, ``train::extra``) that nothing reads and that are right all the same: where an overlay
            replaces what reads a setting of the file below it, or where the reader is a ``%`` macro, of which MONAI
            leaves no trace.

    Raises:
        ConfigError: lists every problem at once.
    """
    workflow, parser = _running()
    settings, found = _evaluate(parser)
    output_dir = settings.get("output_dir")
    excepthook.install(Path(output_dir) if isinstance(output_dir, (str, os.PathLike)) else None)
    found = unread_keys(parser, _entries(workflow) | set(known)) + wrong_arguments(parser) + found
    found += (
        dropped_overrides(parser)
        + problems(settings)
        + missing_paths(settings, PATHS[kind] if paths is None else paths, (*WEIGHTS, *OPTIONAL.get(kind, ())))
    )
    if found:
        raise ConfigError("\n  - ".join(["the settings will not do; nothing was started:", *found]))


def literal_settings(parser: ConfigParser | None = None) -> dict[str, Any]:
    """The top-level settings with their values in JSON's types: no components, ``$`` expressions or ``@`` references.

    Args:
        parser: of the bundle; ``None`` for the one that is running.
    """
    workflow, parser = (None, parser) if parser is not None else _running()
    skipped = _entries(workflow) | {"imports"}
    config = {key: value for key, value in parser.get().items() if key not in skipped and not key.startswith("_")}
    literals = {key: value for key, value in config.items() if _is_literal(value)}
    return _plain({**literals, **_evaluate(parser)[0]})


def unread_keys(parser: ConfigParser, known: Iterable[str] = ()) -> list[str]:
    """One line for every key of the configuration that is no property of MONAI's and that nothing else refers to.

    Args:
        parser: of the bundle, parsed.
        known: further keys that are right, however unread.
    """
    config = {key: value for key, value in parser.get().items() if not key.startswith("_")}
    refers = {key: set(_references(value)) for key, value in config.items()}
    fixed = _properties() | {"imports"} | set(known)
    found = []
    for key, value in config.items():
        others = fixed.union(*(ids for other, ids in refers.items() if other != key))
        if not _is_read(key, others):
            found.append(key)
        elif key not in others:
            found += _unread_inside(value, key, others | refers[key])
    return [f"{path}: nothing reads this key. {_hint(path, config, set(found))}" for path in found]


def wrong_arguments(parser: ConfigParser) -> list[str]:
    """One line for every argument that the class or function named by a component's ``_target_`` does not take."""
    found = []
    for path, component in _components(parser.get()):
        target, accepted = component["_target_"], _parameters(component, parser)
        if accepted is None:
            continue
        for name in sorted(component.keys() - ConfigComponent.non_arg_keys - accepted):
            hint = nearest(name, accepted) or f"It takes {', '.join(sorted(accepted)) or 'none'}."
            found.append(f"{path}{SEP}{name}: {target} takes no such argument. {hint}")
    return found


def dropped_overrides(parser: ConfigParser) -> list[str]:
    """One line for every ``--key None`` of the command line: MONAI takes it for an option that was not given."""
    for frame in _frames():
        if frame.f_code is create_workflow.__code__:
            nones = [key for key, value in frame.f_locals["kwargs"].items() if value is None]
            lost = [key for key in nones if parser.get(key) is not None]
            return [f"{key}: MONAI ignores None here, and keeps {parser[key]!r}. Write --{key} '$None'" for key in lost]
    return []


def missing_paths(settings: Mapping[str, Any], names: Sequence[str], optional: Sequence[str] = WEIGHTS) -> list[str]:
    """One line for every path that does not exist, and for an ``output_dir`` that cannot be written.

    Args:
        names: of the settings that have to be given.
        optional: of those that need not be; an expert's weights may also be "random".
    """
    found, relative = [], False
    for name in (*names, *(name for name in optional if settings.get(name) not in (None, "", "random"))):
        value = settings.get(name)
        if value is None:
            found.append(f"{name}: not given. {ADVICE.get(name, '')}".rstrip())
        elif isinstance(value, (str, os.PathLike)) and not (path := Path(value).expanduser()).exists():
            found.append(f"{name}: there is no {str(value)!r}. {ADVICE.get(name, '')}".rstrip())
            relative |= not path.is_absolute()
    output_dir = settings.get("output_dir")
    if isinstance(output_dir, (str, os.PathLike)) and (reason := _unwritable(Path(output_dir))):
        found.append(f"output_dir: {reason}")
    return found + ([f"Relative paths count from the current folder, {Path.cwd()}"] if relative else [])


def _running() -> tuple[ConfigWorkflow | None, ConfigParser]:
    """The workflow and the parser whose expression called us.

    MONAI hands an expression the items that it refers to and nothing else, neither the configuration nor the names of
    its files. The parser is up the call stack, though, whether the bundle runs from the command line or in process.
    """
    workflow, parser = _caller(ConfigWorkflow), _caller(ConfigParser)
    if parser is None:
        raise ConfigError("this works only in an expression of a bundle that is being run by MONAI")
    return workflow, parser


def _frames() -> Iterator[FrameType]:
    """Whoever called us, from the inside out."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller(kind: type[T]) -> T | None:
    """The innermost object of that class one of whose methods is running."""
    owners = (frame.f_locals.get("self") for frame in _frames())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def _entries(workflow: ConfigWorkflow | None) -> set[str]:
    """The keys that the workflow itself evaluates, and those that it would by default."""
    chosen = {workflow.init_id, workflow.run_id, workflow.final_id} if workflow is not None else set()
    return {"initialize", "run", "finalize"} | chosen


def _properties() -> set[str]:
    """The ids through which MONAI and its applications get at a bundle's parts."""
    return {item["id"] for table in (TrainProperties, InferProperties, MetaProperties) for item in table.values()}


def _options() -> set[str]:
    """What ``monai.bundle run`` takes itself: a misspelt one arrives as an override."""
    return {*inspect.signature(ConfigWorkflow).parameters, "args_file"} - {"override"}


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, (dict, list)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _strings(value)


def _references(config: Any) -> Iterator[str]:
    """The ids that a part of the configuration refers to, as ``train::dataset``."""
    for text in _strings(config):
        yield from ReferenceResolver.match_refs_pattern(text)


def _is_read(path: str, ids: Iterable[str]) -> bool:
    return any(id == path or id.startswith(path + SEP) for id in ids)


def _unread_inside(value: Any, path: str, ids: set[str]) -> Iterator[str]:
    """The unread keys of a plain dict; the arguments of a component are read by what it builds."""
    if not isinstance(value, dict) or ConfigComponent.is_instantiable(value):
        return
    for key, inner in value.items():
        child = f"{path}{SEP}{key}"
        if not key.startswith("_") and not _is_read(child, ids):
            yield child
        elif child not in ids:
            yield from _unread_inside(inner, child, ids)


def _hint(path: str, config: Mapping[str, Any], unread: set[str]) -> str:
    """The nearest key at the same level, or all the settings."""
    *parents, name = path.split(SEP)
    level: Any = config
    for parent in parents:
        level = level[parent]
    siblings = {key for key in level if SEP.join([*parents, key]) not in unread}
    if near := nearest(name, siblings if parents else siblings | _options()):
        return near
    literals = siblings if parents else {key for key in siblings if not isinstance(config[key], dict)} - _entries(None)
    return f"The settings there are: {', '.join(sorted(literals))}."


def _components(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything with a ``_target_`` that is a name, with its id."""
    if isinstance(config, (dict, list)):
        for _, child, value in ReferenceResolver.iter_subconfigs(path, config):
            if isinstance(value, dict) and isinstance(value.get("_target_"), str) and value["_target_"][:1] not in "$@":
                yield child, value
            yield from _components(value, child)


def _parameters(component: dict[str, Any], parser: ConfigParser) -> set[str] | None:
    """The keyword arguments that a component's target takes; ``None`` where any will do, or none can be found out."""
    try:
        target = pydoc.locate(ConfigComponent(component, locator=parser.locator).resolve_module_name())
        parameters = inspect.signature(target).parameters.values()  # type: ignore[arg-type]
    except (pydoc.ErrorDuringImport, TypeError, ValueError):
        return None  # MONAI itself says so where the target is missing or broken
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {item.name for item in parameters if item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)}


def _evaluate(parser: ConfigParser) -> tuple[dict[str, Any], list[str]]:
    """The values of the settings that have a rule, and one line for every one that cannot be worked out."""
    values: dict[str, Any] = {}
    found = []
    for name in RULES:
        if name not in parser or _builds(parser, name):
            continue
        try:
            values[name] = parser.get_parsed_content(name)
        except Exception as error:  # an expression may raise anything
            cause = error.__cause__ or error
            found.append(f"{name}: {parser[name]!r} cannot be worked out: {cause}")
    return values, found


def _builds(parser: ConfigParser, id: str) -> bool:
    """Whether working out this id would instantiate a component."""
    waiting, seen = [id], set()
    while waiting:
        current = waiting.pop()
        if current in seen or current not in parser:
            continue
        seen.add(current)
        config = parser[current]
        if ConfigComponent.is_instantiable(config) or next(_components({"": config}), None):
            return True
        waiting += _references(config)
    return False


def _is_literal(config: Any) -> bool:
    expression = any(ConfigExpression.is_expression(text) for text in _strings(config))
    return not expression and not any(_references(config)) and not any(_components({"": config}))


def _plain(value: Any) -> Any:
    """``value`` in JSON's types, and as a string where it has none."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _unwritable(folder: Path) -> str:
    """Why nothing can be written below ``folder``, which need not exist yet; "" where it can."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return f"{existing} is a file, expected a folder"
    return "" if os.access(existing, os.W_OK) else f"{existing} cannot be written to. Give another --output_dir"
