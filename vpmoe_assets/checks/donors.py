"""Checks of the donors, before anything is made of them."""

from collections.abc import Mapping

from trainer.contract.schema.sources import HubDonor, HubVocabulary, SeededDonor, SeededVocabulary
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.errors import DonorError
from vpmoe_assets.verdict import Verdict


def pinned_files(source: HubDonor | HubVocabulary | SeededDonor | SeededVocabulary) -> Check:
    """Return the check that the files are the pinned ones and the tokenizer is the published one."""

    @check("pinned_files")
    def pinned(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Every pinned file has its sha256, and the tokenizer is byte for byte the published one."""
        from vpmoe_assets.donors import tokenizers
        from vpmoe_assets.lineage.digest import file_sha256

        qwen3 = isinstance(source, SeededDonor | HubDonor)
        published = tokenizers.QWEN3_TOKENIZER_SHA256 if qwen3 else tokenizers.O200K_TOKENIZER_SHA256
        pins = {tokenizers.TOKENIZER_NAME: published, **getattr(source, "files", {})}
        found = {
            name: file_sha256(path) if (path := item.payload / name).is_file() else "absent" for name in pins
        }
        wrong = [
            f"{name}: {found[name]} found, {pin} pinned" for name, pin in pins.items() if found[name] != pin
        ]
        return Verdict(
            not wrong,
            "; ".join(wrong) or f"{', '.join(pins)} have their pinned sha256",
            {"pins": len(pins)},
        )

    return pinned


def donor_architecture(donor: SeededDonor | HubDonor) -> Check:
    """Return the check that configuration and tensors are those of the experiment's donor."""

    @check("architecture")
    def architecture(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Configuration and tensors are those of the experiment's donor."""
        from trainer.contract.donor import donor_shapes
        from vpmoe_assets.donors.checkpoints import require_qwen3

        try:
            require_qwen3(donor, item.payload)
        except DonorError as error:
            return Verdict(False, str(error), {})
        tensors = len(donor_shapes(donor))
        shape = f"{donor.num_layers} layers of width {donor.hidden_size}, {tensors} tensors"
        return Verdict(True, shape, {})

    return architecture


def vocabulary_matrices(vocabulary: SeededVocabulary | HubVocabulary) -> Check:
    """Return the check that embedding and head fit the experiment's vocabulary, and every token has a row."""

    @check("vocabulary")
    def matrices(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Embedding and head have a row for every token; special ids are those of o200k Harmony."""
        from vpmoe_assets.donors.checkpoints import require_vocabulary
        from vpmoe_assets.harmony.tokenizer import SPECIAL_IDS, load_ranks

        try:
            require_vocabulary(vocabulary, item.payload)
        except DonorError as error:
            return Verdict(False, str(error), {})
        ids = _token_ids(item)
        ranks = load_ranks(inputs["o200k_tokenizer"].payload)
        wrong = [name for name, number in SPECIAL_IDS.items() if ids.get(name) != number]
        fits = max(ids.values()) < vocabulary.vocab_size and not wrong
        same = len(ids) >= len(ranks)
        return Verdict(
            fits and same,
            f"{len(ids)} tokens for {vocabulary.vocab_size} rows of width {vocabulary.hidden_size}; "
            f"special tokens with other ids: {', '.join(wrong) or 'none'}",
            {"tokens": len(ids), "rows": vocabulary.vocab_size},
        )

    return matrices


def _token_ids(item: Published) -> dict[str, int]:
    import orjson

    from vpmoe_assets.donors.tokenizers import TOKENIZER_NAME

    content = orjson.loads((item.payload / TOKENIZER_NAME).read_bytes())
    added = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
    return {**content["model"]["vocab"], **added}
