"""The card of a published checkpoint: the one that lies in the folder, filled with what the run knows.

What people wrote stays. Between two markers stands what this module knows and writes anew at every push: results with
their intervals, versions, the origin of the weights. Into the metadata goes what the Hub searches by. Training data and
held-out losses are in the card already: training wrote them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..card_worldvla import CARD_NAME, TAGS, model_card
from ..configuration_worldvla import WorldVLAConfig
from ..diagnosis.files import ADAPTER_CONFIG
from ..evaluation.results import format_rate, read_episodes, summarize
from .folder import ADAPTER, Publication

BEGIN, END = "<!-- worldvla push: begin -->", "<!-- worldvla push: end -->"
CHAMELEON_CODES, CHAMELEON_VOCABULARY = 8192, 65536
CHAMELEON_LICENSE = "https://ai.meta.com/resources/models-and-libraries/chameleon-license/"
CHAMELEON_POLICY = "https://ai.meta.com/resources/models-and-libraries/chameleon-use-policy/"
CHAMELEON_TEXT = "https://github.com/facebookresearch/chameleon/blob/main/LICENSE"  # a copy that can be passed on
CHAMELEON_LICENSE_NAME = "chameleon-research-license"  # as the Hub's card of facebook/chameleon-7b names it
# section 2.2.3 of the licence asks for this sentence in a text file beside the weights
CHAMELEON_NOTICE = (
    "Chameleon is licensed under the Chameleon Research License, Copyright (c) Meta Platforms, Inc. "
    "All Rights Reserved.\n"
)
UNFILLED = "[More Information Needed]"  # of the form that PEFT and transformers write
_ADAPTER = """\
---
library_name: peft
---

# WorldVLA adapter

A LoRA adapter of an autoregressive action world model ([paper](https://arxiv.org/abs/2506.21539)). Opened, it fetches
its base by itself.

```python
import transformers_worldvla
from transformers import AutoModelForCausalLM, AutoProcessor

repo = "..."  # this repository, or a local copy of it
processor = AutoProcessor.from_pretrained(repo)
model = AutoModelForCausalLM.from_pretrained(repo)
```
"""
_LINEAGE = f"""\
Vocabulary and image tokenizer are Chameleon's. Weights that descend from Meta's Chameleon, as those of WorldVLA and
Lumina-mGPT do, stand under the [Chameleon Research License]({CHAMELEON_LICENSE}), whatever the licence of the code is:

- use, changes and outputs are for **noncommercial research only** (sections 2.1 and 3.1);
- they are passed on, changed or not, under the same terms only, with a copy of the licence and with the file `NOTICE`
  (section 2.2);
- Meta's [Acceptable Use Policy]({CHAMELEON_POLICY}) is part of it.

The pages of the published WorldVLA weights say Apache-2.0. That covers what their authors added, not what comes from
Chameleon. Read the licence before you use these weights or pass them on."""
_UNKNOWN = f"""\
An adapter changes the weights of its base, whose licence applies. Where these descend from Meta's Chameleon, that is
the [Chameleon Research License]({CHAMELEON_LICENSE}) (noncommercial research only)."""
_OWN = """\
The vocabulary is not Chameleon's ({vocab_size} tokens, {codes} image codes): these weights do not descend from Meta's
Chameleon, unless their publisher says otherwise. The code that travels with them is under Apache-2.0."""


def fill_card(
    publication: Publication,
    versions: Mapping[str, str | None],
    results: Sequence[Path] = (),
    license_id: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The card of a model or adapter, filled; nothing is written.

    Args:
        versions: of the packages on this machine.
        results: folders that `worldvla evaluate` wrote for these very weights.
        license_id: of the weights, as the Hub names it; the card's own by default, `other` for Chameleon's lineage.
        base_model: Hub id that this was fine-tuned from; by default what the card or the adapter says.

    Raises:
        ValueError: results that cannot be read, or a licence other than Chameleon's where the weights look like it.
    """
    folder = publication.folder
    # an adapter has none; that of its base may be on another machine
    config = None if publication.kind == ADAPTER else WorldVLAConfig.from_pretrained(folder, local_files_only=True)
    card = _start(publication, config)
    data: Any = card.data
    evaluations = {each: read_episodes(each) for each in results}
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS, *(["lora"] if publication.kind == ADAPTER else [])]))
    data.library_name = "peft" if publication.kind == ADAPTER else data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "robotics"
    data.base_model = base_model or adapter_base(folder) or data.base_model
    _set_license(data, config, license_id)
    if evaluations:
        data.model_name = folder.resolve().name
        data.eval_results = _eval_results(evaluations)
    section = _section(config, versions, evaluations, data)
    card.text = _replace_section(card.text, section)
    return card


def adapter_base(folder: Path) -> str | None:
    """What an adapter says it belongs to; None for a whole model."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")


def has_chameleon_lineage(config: WorldVLAConfig) -> bool:
    """Whether vocabulary and image tokenizer have Chameleon's sizes."""
    return bool(config.vq_config.num_embeddings == CHAMELEON_CODES and config.vocab_size >= CHAMELEON_VOCABULARY)


def has_chameleon_license(card: ModelCard) -> bool:
    """Whether the card puts the weights under Chameleon's licence."""
    data: Any = card.data
    return bool(data.license == "other" and data.license_name == CHAMELEON_LICENSE_NAME)


def _start(publication: Publication, config: WorldVLAConfig | None) -> ModelCard:
    """The card in the folder; a new one where there is none, or only a library's form with nothing filled in."""
    path = publication.folder / CARD_NAME
    card = ModelCard.load(path) if path.is_file() else ModelCard(model_card(config) if config else _ADAPTER)
    if UNFILLED in card.text:
        card.text = ModelCard(model_card(config) if config else _ADAPTER).text
    return card


def _set_license(data: Any, config: WorldVLAConfig | None, license_id: str | None) -> None:
    data.license = license_id or data.license
    if config is None or not has_chameleon_lineage(config):
        return
    if license_id is None and data.license not in (None, "other"):
        raise ValueError(
            f"the card gives the weights the licence {data.license}, but vocabulary and image tokenizer are "
            "Chameleon's: say --license other, or the one that you know to hold"
        )
    if data.license in (None, "other") and data.license_name is None:
        data.license, data.license_name, data.license_link = "other", CHAMELEON_LICENSE_NAME, CHAMELEON_LICENSE


def _eval_results(evaluations: Mapping[Path, Sequence[Mapping[str, Any]]]) -> list[EvalResult]:
    """Success rates as the Hub shows them."""
    found = []
    for rows in evaluations.values():
        for suite, numbers in summarize(rows)["suites"].items():
            if numbers["success_rate"] is not None:
                found.append(
                    EvalResult(
                        task_type="robotics",
                        task_name="Robotics",
                        dataset_type=suite,
                        dataset_name=suite,
                        metric_type="success_rate",
                        metric_name=f"success rate, 95 % interval and counts: {format_rate(numbers)}",
                        metric_value=round(100 * numbers["success_rate"], 2),
                    )
                )
    return found


# -------------------------------------------------------------------- the section between the markers


def _section(
    config: WorldVLAConfig | None,
    versions: Mapping[str, str | None],
    evaluations: Mapping[Path, Sequence[Mapping[str, Any]]],
    data: Any,
) -> str:
    lines = ["## Results", "", *(_result_lines(evaluations) or ["Closed-loop success was not measured for this card."])]
    lines += ["", "## Versions", "", "| | published with | evaluated with |", "|---|---|---|"]
    used: dict[str, set[str]] = {}
    for rows in evaluations.values():
        for row in rows:
            for name, version in (row.get("versions") or {}).items():
                if version is not None:
                    used.setdefault(name, set()).add(str(version))
    for name in sorted({*versions, *used}):
        lines.append(f"| {name} | {versions.get(name) or '-'} | {', '.join(sorted(used.get(name, ()))) or '-'} |")
    if config is not None and config.generator_version:
        lines += ["", f"The weights were written by transformers_worldvla {config.generator_version}."]
    lines += ["", "## Licence and origin", ""]
    if data.base_model:
        lines += [f"Made from {_listed(data.base_model)}, whose licence applies too.", ""]
    if config is None:
        lines.append(_UNKNOWN)
    elif has_chameleon_lineage(config):
        lines.append(_LINEAGE)
    else:
        lines.append(_OWN.format(vocab_size=config.vocab_size, codes=config.vq_config.num_embeddings))
    return "\n".join(lines)


def _result_lines(evaluations: Mapping[Path, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = []
    for rows in evaluations.values():
        for suite, numbers in summarize(rows)["suites"].items():
            for task, of_task in numbers["tasks"].items():
                lines.append(f"| {suite} | {task} | {of_task['instruction'] or ''} | {format_rate(of_task)} |")
            lines.append(f"| **{suite}** | all | | **{format_rate(numbers)}** |")
    head = ["Closed loop, `worldvla evaluate`; 95 % Wilson intervals.", ""]
    return [*head, "| suite | task | instruction | success |", "|---|---|---|---|", *lines] if lines else []


def _listed(base: str | list[str]) -> str:
    return ", ".join(f"`{each}`" for each in ([base] if isinstance(base, str) else base))


def _replace_section(text: str, section: str) -> str:
    """The text with the section between the markers; at its end where there are none yet."""
    block = f"{BEGIN}\n{section}\n{END}"
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if between.search(text):
        return between.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"
