"""Whether a model's parts are of one model: config.json, weights and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from planner.architectures import FAMILIES, Family, is_buffer
from planner.config_facts import Facts, asks_windows, check_bounds, facts_of, read_config, read_json, text_config
from planner.reading.files import listing, tensors_of

LONGEST_TOKENIZER_BYTES = 256 * 2**20

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_complete(folder: Path) -> None:
    """Refuse a folder whose weights are not those config.json describes: layers missing, left over, other shapes.

    Known families are compared by name and shape in milliseconds; for others transformers is asked, in its own process.

    Raises:
        BadInput: config and weights disagree.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    config = read_config(config_file)
    tensors = tensors_of(folder)
    if tensors is None:
        return  # .bin weights: the candidate's loader compares them
    family = family_of(config)
    check_bounds(text_config(config), where=str(config_file))
    if family is None or asks_windows(config, family):
        described = describe_model(config_file, folder, weights=True)
        _refuse_disagreement(described.missing, described.unexpected, described.mismatched, folder)
    else:
        facts = facts_of(config, family, [], where=str(config_file))
        agree(config, family, facts, {n: t.shape for n, t in tensors.items()}, config_file, folder)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family whose table tells this model's tensors: its language model is all there is, and has a head."""
    if text_config(config).get("model_type") != config["model_type"]:
        return None
    named = config.get("architectures")
    heads = ("ForCausalLM", "LMHeadModel")
    if isinstance(named, list) and named and not any(str(name).endswith(heads) for name in named):
        return None
    return FAMILIES.get(str(config["model_type"]))


def is_tied(
    config: Mapping[str, Any], language: Mapping[str, Any], family: Family | None, *, has_head: bool | None
) -> bool:
    """Return whether input and output share one table; where config.json does not say, the weights or the family do."""
    if has_head is False:
        return True
    for source in (language, config):
        if isinstance(source.get("tie_word_embeddings"), bool):
            return bool(source["tie_word_embeddings"])
    return family.tied if family else not has_head


def agree(
    config: Mapping[str, Any],
    family: Family,
    facts: Facts,
    stored: Mapping[str, tuple[int, ...]],
    config_file: Path,
    folder: Path,
) -> None:
    """Refuse weights that are not those the family's config describes.

    Missing weights and other shapes are certain. Names the family does not have may be older spellings or extras that
    transformers knows, so it is asked.
    """

    def plain(name: str) -> str:  # without the prefix of the inner model, which some files leave out
        first, _, rest = name.partition(".")
        return rest if first in ("model", "transformer", "backbone", "gpt_neox") else name

    expected = expected_shapes(family, facts, config, config_file)
    names = {plain(n): n for n in (*stored, *expected)}
    wanted = {plain(n): s for n, s in expected.items()}
    found = {plain(n): s for n, s in stored.items() if not is_buffer(n)}
    heads = {"lm_head.weight", "embed_out.weight"}
    if is_tied(config, config, family, has_head=bool(heads & found.keys())):
        wanted, found = ({n: s for n, s in side.items() if n not in heads} for side in (wanted, found))
    if found.keys() - wanted.keys():
        described = describe_model(config_file, folder, weights=True)
        _refuse_disagreement(described.missing, described.unexpected, described.mismatched, folder)
    else:
        missing = [names[n] for n in wanted if n not in found]
        other = [f"{names[n]} is {s}, config.json says {wanted[n]}" for n, s in found.items() if s != wanted[n]]
        _refuse_disagreement(missing, (), other, folder)


def expected_shapes(
    family: Family, facts: Facts, config: Mapping[str, Any], config_file: Path
) -> dict[str, tuple[int, ...]]:
    try:
        shapes = family.shapes(family, facts.sizes, config)
        if bad := next((name for name, shape in shapes.items() if min(shape) < 1), None):
            raise ValueError(f"`{bad}` would be {shapes[bad]}")
        return shapes
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(
            f"config.json: sizes that make no model ({type(error).__name__}: {error})",
            hint="mend config.json",
            where=str(config_file),
        ) from error


def describe_model(config_file: Path, folder: Path, *, weights: bool) -> Any:
    import shutil
    import tempfile

    from planner.describing import describe

    if config_file == folder / "config.json":
        return describe(folder, weights=weights)
    with tempfile.TemporaryDirectory(prefix="leanplan-") as name:
        shutil.copyfile(config_file, Path(name) / "config.json")
        return describe(Path(name), weights=False)


def _refuse_disagreement(
    missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str], folder: Path
) -> None:
    problems = [listing(missing, "missing")] if missing else []
    if unexpected:
        problems.append(listing(unexpected, "left over"))
    if mismatched:
        problems.append(mismatched[0] + (f", and {len(mismatched) - 1} more" if mismatched[1:] else ""))
    if problems:
        raise BadInput(
            f"{'; '.join(problems)}: config and weights disagree",
            hint="config.json and the weight files must be of the same model; download it again",
            where=str(folder),
        )


def check_tokenizer(folder: Path, vocab_size: int, rows: int, weights: str, notes: list[str]) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings, and a model without one."""
    present = [name for name in _TOKENIZERS if (folder / name).exists()]
    if not present:
        if weights == "required":
            raise BadInput(
                "no tokenizer",
                hint="put the model's tokenizer.json into the folder; quality is measured on text",
                where=str(folder),
            )
        return
    if present[0] == "tokenizer.json":
        facts = read_json(folder / "tokenizer.json", LONGEST_TOKENIZER_BYTES)
        model, added = facts.get("model"), facts.get("added_tokens") or []
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
            raise BadInput(
                "no vocabulary in it", hint="download the tokenizer again", where=str(folder / "tokenizer.json")
            )
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    elif present[0] == "vocab.json":
        ids = list(read_json(folder / "vocab.json", LONGEST_TOKENIZER_BYTES).values())
    else:
        notes.append(f"the vocabulary of {present[0]} is compared with the embeddings only when it is loaded")
        return
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise BadInput(
            "token ids are not whole numbers", hint="download the tokenizer again", where=str(folder / present[0])
        )
    tokens = max(ids) + 1
    if tokens > rows:
        raise BadInput(
            f"the tokenizer has {tokens} tokens, embeddings {rows}",
            hint="use the tokenizer the model was trained with",
            where=str(folder / present[0]),
        )
    if 2 * tokens < vocab_size:
        notes.append(f"the tokenizer uses {tokens} of {vocab_size} embeddings: is it this model's?")
