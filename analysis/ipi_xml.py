"""i-PI's input as a tree: the systems of templates written out, and which outputs and forcefields are a system's."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from voltpi.potential.errors import InputError

__all__ = ["fill_templates", "forcefields", "output_start", "systems_of", "words_of"]


def words_of(text: str | None) -> list[str]:
    """The entries of one of i-PI's lists, ``[1, 2, 3]``."""
    return (text or "").strip().strip("[]").replace(",", " ").split()


def fill_templates(root: ET.Element, file: str) -> None:
    """Puts a ``<system>`` in place of each ``<instance>`` of a ``<system_template>``, as i-PI does.

    Raises InputError, which names the ``file``, where labels and instances do not match.
    """
    for element in root.findall("system_template"):
        template = element.find("template")
        labels = words_of(element.findtext("labels"))
        text = "" if template is None else "".join(ET.tostring(part, encoding="unicode") for part in template)
        for instance in element.findall("instance"):
            words = words_of(instance.text)
            if len(words) != len(labels):
                raise InputError(
                    f"{file}: <system_template> has {len(labels)} labels but an <instance> of {len(words)} words; give "
                    "each label one"
                )
            system = text
            for label, word in sorted(zip(labels, words, strict=True), reverse=True):
                system = system.replace(label, word)
            root.append(ET.fromstring(system))
        root.remove(element)


def output_start(root: ET.Element, system: ET.Element) -> str:
    """What the names of a system's outputs begin with: ``run.``, or ``left_run.`` for a system with the prefix left."""
    output = root.find("output")
    prefix = "i-pi" if output is None else output.get("prefix", "i-pi").strip()
    own = system.get("prefix", "").strip()
    return (f"{own}_" if own else "") + (f"{prefix}." if prefix else "")


def systems_of(root: ET.Element, names: list[str]) -> list[ET.Element]:
    """The systems that wrote outputs of these ``names``; all of them where that says nothing."""
    systems = root.findall("system")
    return [s for s in systems if any(name.startswith(output_start(root, s)) for name in names)] or systems


def forcefields(root: ET.Element, names: list[str]) -> set[str] | None:
    """Names of the forcefields of the systems that wrote outputs of these ``names``; None where that says nothing."""
    wrote = systems_of(root, names)
    if len(wrote) == len(root.findall("system")):
        return None
    return {force.get("forcefield", "").strip() for s in wrote for force in s.iterfind("forces/force")}
