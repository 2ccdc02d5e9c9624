"""Checks of the teacher: its token ids are the student's, it is the one asked for, it answers."""

from collections.abc import Mapping

from trainer.contract.schema.sources import HubTeacher, ServerTeacher, TokenizerSource
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.verdict import Verdict

_SPACE = "token_id_space"


def trained_token_ids(tokenizer: TokenizerSource) -> Check:
    """Return the check that a teacher of ours was trained on the student's token ids."""

    @check(_SPACE)
    def space(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Its vocabulary has the student's size, and its data were written by the student's tokenizer."""
        from vpmoe_assets.donors.checkpoints import read_config

        rows = read_config(item.payload)["architecture"]["vocab_size"]
        ranks = inputs["synth_kd_v1"].manifest["tokenizer"]["model_sha256"]
        faults = []
        if rows != tokenizer.vocab_size:
            faults.append(f"its vocabulary has {rows} ids, the student's {tokenizer.vocab_size}")
        if ranks != tokenizer.sha256:
            faults.append(f"its data were written by ranks {ranks}, the student's are {tokenizer.sha256}")
        return Verdict.of(faults, f"{rows} ids, by ranks {ranks[:12]}", {"vocab_size": rows})

    return space


def published_token_ids(tokenizer: TokenizerSource) -> Check:
    """Return the check that a published teacher has the student's token ids."""

    @check(_SPACE)
    def space(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Its head has the student's rows, and its tokenizer is o200k Harmony's, byte for byte."""
        from vpmoe_assets.donors.teacher import vocabulary_faults
        from vpmoe_assets.harmony.tokenizer import load_ranks

        ranks = load_ranks(inputs["o200k_tokenizer"].payload)
        faults = vocabulary_faults(tokenizer.vocab_size, ranks, item.payload)
        return Verdict.of(faults, f"{tokenizer.vocab_size} rows, {len(ranks)} ranks", {"ranks": len(ranks)})

    return space


def served_token_ids(source: ServerTeacher, tokenizer: TokenizerSource) -> Check:
    """Return the check that a served teacher is described as one of the student's token ids."""

    @check(_SPACE)
    def space(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Its descriptor names the student's tokenizer, the model and the commit of the experiment.

        What the server really answers with is tested by every job before it scores anything.
        """
        from vpmoe_assets.donors.teacher import descriptor_faults

        faults = descriptor_faults(source, tokenizer.sha256, item.payload)
        return Verdict.of(faults, f"{source.model} at {source.revision}", {"revision": source.revision})

    return space


def fetched_revision(source: HubTeacher) -> Check:
    """Return the check that what was fetched is of the pinned commit."""

    @check("revision")
    def revision(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Repository and commit are the experiment's, and every pinned file has its sha256."""
        from vpmoe_assets.donors.teacher import revision_faults
        from vpmoe_assets.lineage.digest import file_sha256

        faults = revision_faults(source, item.manifest)
        for name, pin in source.files.items():
            path = item.payload / name
            found = file_sha256(path) if path.is_file() else "absent"
            if found != pin:
                faults.append(f"{name}: {found} found, {pin} pinned")
        return Verdict.of(faults, f"{source.repo} at {source.revision}", {"pins": len(source.files)})

    return revision


def answers(source: ServerTeacher) -> Check:
    """Return the check that every replica of a served teacher answers."""

    @check("reachable", blocking=False)
    def reachable(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Every replica that the environment names answers, and serves the model."""
        from vpmoe_assets.donors.teacher import addresses, silent
        from vpmoe_assets.lineage.errors import EvidenceMissing

        urls = addresses(source.url_env)
        if not urls:
            raise EvidenceMissing(
                f"the environment variable {source.url_env} is not set, so nobody could be asked; set it to "
                "the addresses of the replicas before scores are made"
            )
        found = {"replicas": len(urls)}
        return Verdict.of(silent(urls, source.model), f"{len(urls)} replicas serve it", found)

    return reachable
