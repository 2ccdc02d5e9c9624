"""What is signed, held against model-signing, in-toto and securesystemslib; and every way to break it."""

import base64
import json
import shlex
import subprocess

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.lineage.fabricate import damage, draft, fill, publish, recipe
from tests.lineage.keys import make_key
from vpmoe_assets.cli import main
from vpmoe_assets.lineage import attestation, collecting
from vpmoe_assets.lineage.errors import ArtifactDamaged, SignatureError
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.signing import Signer
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.verify import Look, verify_artifact

CURVES = (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())


def nothing():
    return None


@pytest.fixture
def key(tmp_path):
    return make_key(tmp_path / "k.pem")


@pytest.fixture
def signer(key):
    return Signer.of(key, nothing)


@pytest.fixture
def chain(store):
    """Three artifacts in a row; the first has files that tools of git would pass over."""
    files = {"a.bin": b"1", ".gitattributes": b"2", "z/€ odd.txt": b"3", "z.bin": b"4"}
    synth = publish(store, "synth", files=files)
    data = publish(store, "synth_kd_v1", (synth,))
    return synth, data, publish(store, "vpmoe", (data,), metrics={"loss": 1.5})


def stranger(command):
    """Run what a stranger runs; return exit code and output."""
    from model_signing._cli import main as model_signing

    assert command[0] == "model_signing"
    result = CliRunner().invoke(model_signing, command[1:])
    return result.exit_code, result.output


def wrong(store, record, **look):
    found = verify_artifact(store, Index(store.root / "index.duckdb"), record, Look(**look))
    return [f"{each.artifact}: {each.message}" for each in found.problems if each.kind == "signature"]


def notes(store, record):
    look = Look(audit=lambda record: ())
    found = verify_artifact(store, Index(store.root / "index.duckdb"), record, look)
    return [each.message for each in found.notes if each.kind == "signature"]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_a_stranger_checks_the_payload_with_model_signing_alone(store, chain, tmp_path, curve):
    signer = Signer.of(make_key(tmp_path / "own.pem", curve=curve), nothing)
    for record in chain:
        said, new = attestation.attest(store, record, signer)
        assert new
        assert stranger(attestation.strangers_command(store, record, said))[0] == 0
    damage(store.payload(chain[0]) / "z.bin")
    code, text = stranger(
        attestation.strangers_command(store, chain[0], store.statements.about(chain[0])[-1])
    )
    assert code == 1
    assert "Hash mismatch" in text
    assert "z.bin" in text


def test_the_provenance_is_a_valid_in_toto_statement_that_others_verify(store, chain, signer):
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement as InTotoStatement
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    said, _ = attestation.attest(store, chain[2], signer)
    bundle = json.loads(ObjectStore(store.root).get(said.body["provenance"]))
    envelope = bundle["dsseEnvelope"]
    keyid = "k"
    theirs = Envelope.from_dict(
        {**envelope, "signatures": [{"sig": envelope["signatures"][0]["sig"], "keyid": keyid}]}
    )
    public = SSlibKey(keyid, "ecdsa", "ecdsa-sha2-nistp256", {"public": signer.public_pem.decode("ascii")})
    theirs.verify([public], 1)

    payload = json.loads(base64.b64decode(envelope["payload"]))
    proto = json_format.ParseDict(payload, statement_pb2.Statement())
    InTotoStatement.copy_from_pb(proto).validate()
    json_format.ParseDict(payload["predicate"], provenance_pb2.Provenance())  # unknown keys are errors
    [used] = [
        each
        for each in payload["predicate"]["buildDefinition"]["resolvedDependencies"]
        if each["name"] == "synth_kd_v1"
    ]
    assert used["digest"] == {"vpmoeContent": chain[1].digest, "vpmoeRecord": chain[1].record_digest}


def test_signing_again_with_the_same_key_says_nothing_new_and_another_key_adds_its_own(
    store, chain, signer, tmp_path
):
    first, _ = attestation.attest(store, chain[0], signer)
    assert attestation.attest(store, chain[0], signer) == (first, False)
    other = Signer.of(make_key(tmp_path / "other.pem"), nothing)
    second, new = attestation.attest(store, chain[0], other)
    assert new
    assert second.body["key"] != first.body["key"]
    assert wrong(store, chain[0], key=other.key) == wrong(store, chain[0], key=signer.key) == []


def test_a_damaged_payload_is_not_signed(store, chain, signer):
    damage(store.payload(chain[1]) / "data.bin")
    with pytest.raises(ArtifactDamaged, match="so it is not signed"):
        attestation.attest(store, chain[1], signer)


def test_another_key_than_the_one_that_is_asked_for_is_named(store, chain, signer, tmp_path):
    attestation.attest(store, chain[2], signer)
    other = Signer.of(make_key(tmp_path / "other.pem"), nothing)
    found = wrong(store, chain[2], key=other.key)
    assert len(found) == 3  # the artifact, and what it was made from
    assert f"not signed with key {other.key[:12]}; it is signed with {signer.key[:12]}" in found[0]


def test_deep_tells_which_ancestors_are_signed_and_which_are_not(store, chain, signer):
    assert notes(store, chain[2]) == []
    attestation.attest(store, chain[2], signer)
    attestation.attest(store, chain[0], signer)
    told = notes(store, chain[2])
    assert told[0] == f"2 of 3 signed with key {signer.key[:12]}"
    assert told[1].startswith("signed by nobody: smoke/synth_kd_v1/")


def _replaced(store, said, **body):
    """State the same signature with other objects, as somebody who can write the store would."""
    objects = ObjectStore(store.root)
    put = {role: objects.put(content, role) for role, content in body.items() if role != "key"}
    again = said.followed_by("signed", {**said.body, **put, **{k: body[k] for k in body if k == "key"}})
    return store.statements.append(again)


def test_every_forged_signature_is_named(store, chain, signer, tmp_path):
    said, _ = attestation.attest(store, chain[1], signer)
    parent, _ = attestation.attest(store, chain[0], signer)
    objects = ObjectStore(store.root)
    bundle = json.loads(objects.get(said.body["payload"]))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    other = Signer.of(make_key(tmp_path / "other.pem"), nothing)
    provenance = attestation.provenance_statement(chain[1])
    claims = {**provenance, "predicate": {**provenance["predicate"], "more": "than the record says"}}
    forgeries = {
        "does not verify with key": {"payload": json.dumps(bundle).encode()},
        "is no bundle": {"payload": b"{}"},
        "was signed with key": {"provenance": other.sign(provenance)},
        "and its public key is": {"public_key": other.public_pem},
        "no public key in PEM": {"public_key": b"x"},
        "signs other files": {"payload": objects.get(parent.body["payload"])},
        "its provenance is of other files": {"provenance": objects.get(parent.body["provenance"])},
        "its provenance is another one": {"provenance": signer.sign(claims)},
        "signs another kind": {"payload": signer.sign({"predicate": {}})},
    }
    for expected, forged in forgeries.items():
        _replaced(store, said, **forged)
        assert expected in wrong(store, chain[1])[-1], expected


def test_a_lost_or_altered_bundle_and_an_altered_statement_are_named(store, chain, signer):
    said, _ = attestation.attest(store, chain[1], signer)
    path = ObjectStore(store.root).path(said.body["payload"])
    damage(path)
    assert "is damaged" in wrong(store, chain[1])[0]
    path.unlink()
    assert "is not in" in wrong(store, chain[1])[0]
    [line] = [each for each in store.statements.root.rglob("*.jsonl") if chain[1].record_digest in each.name]
    line.write_text(line.read_text().replace(signer.key, "0" * 64))
    found = verify_artifact(store, Index(store.root / "index.duckdb"), chain[1], Look())
    assert any(each.kind == "statement" and "altered" in each.message for each in found.problems)


def test_a_signature_is_of_one_record_and_not_of_another_with_the_same_files(store, chain, signer):
    twin = publish(store, "synth_kd_v1", (chain[0],))
    said, _ = attestation.attest(store, chain[1], signer)
    store.statements.append(Statement.about(twin, "signed", said.body))
    assert "signs record" in wrong(store, twin)[0]


def test_keys_that_others_can_read_and_keys_of_other_kinds_are_refused(tmp_path):
    open_key = make_key(tmp_path / "open.pem", mode=0o640)
    with pytest.raises(SignatureError, match=r"can be read by others \(mode 0640\): chmod 600"):
        Signer.of(open_key, nothing)
    small = make_key(tmp_path / "small.pem", curve=ec.SECP256K1())
    with pytest.raises(SignatureError, match=r"EC over secp256k1, expected .*openssl genpkey"):
        Signer.of(small, nothing)
    edwards = tmp_path / "edwards.pem"
    edwards.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    edwards.chmod(0o600)
    with pytest.raises(SignatureError, match="Ed25519PrivateKey, expected an EC key"):
        Signer.of(edwards, nothing)
    edwards.write_bytes(b"no key")
    with pytest.raises(SignatureError, match="no private key in PEM"):
        Signer.of(edwards, nothing)


def test_a_passphrase_is_asked_for_only_where_the_key_has_one(tmp_path):
    locked = make_key(tmp_path / "locked.pem", "correct horse")
    assert Signer.of(locked, lambda: "correct horse").key
    with pytest.raises(SignatureError, match="another passphrase than its own"):
        Signer.of(locked, lambda: "wrong")
    with pytest.raises(SignatureError, match="set VPMOE_KEY_PASSPHRASE"):
        Signer.of(locked, nothing)
    asked = []
    Signer.of(make_key(tmp_path / "plain.pem"), lambda: asked.append(1))
    assert not asked


def test_the_verb_signs_a_chain_hands_it_on_and_keeps_the_passphrase_to_itself(
    store, chain, tmp_path, monkeypatch
):
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(store.root))
    monkeypatch.setenv("VPMOE_KEY_PASSPHRASE", "correct horse battery")
    private = make_key(tmp_path / "own.pem", "correct horse battery")
    given = ["attest", "vpmoe", "--key", str(private), "--ancestors"]
    result = CliRunner().invoke(main, [*given, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    command = shlex.split(result.output.partition("anybody checks it with\n")[2].splitlines()[0])
    assert stranger(command)[0] == 0
    handed = tmp_path / "out" / "synth" / chain[0].version
    code, _ = stranger(
        [
            *("model_signing", "verify", "key", str(store.payload(chain[0])), "--no-ignore-git-paths"),
            *("--signature", str(handed / "model.sig"), "--public_key", str(private.with_suffix(".pub"))),
        ]
    )
    assert code == 0
    again = json.loads(CliRunner().invoke(main, [*given, "--json"]).output)
    assert [each["new"] for each in again["signed"]] == [False] * 3
    assert [each["artifact"].split("/")[1] for each in again["signed"]] == ["synth", "synth_kd_v1", "vpmoe"]
    verified = CliRunner().invoke(main, ["verify", "vpmoe", "--key", str(private.with_suffix(".pub"))])
    assert verified.exit_code == 0, verified.output
    assert f"3 artifacts verified: all intact, all signed with key {again['key'][:12]}" in verified.output
    assert f"signed with key {again['key'][:12]} by " in CliRunner().invoke(main, ["show", "synth"]).output
    found = subprocess.run(
        ["grep", "-rl", "correct horse battery", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_the_verb_refuses_a_key_in_the_store_and_a_chain_with_a_gap(store, chain, key, monkeypatch):
    import shutil

    monkeypatch.setenv("VPMOE_ARTIFACTS", str(store.root))
    inside = make_key(store.root / "own.pem")
    refused = CliRunner().invoke(main, ["attest", "vpmoe", "--key", str(inside)])
    assert (refused.exit_code, "lies in the store" in refused.output) == (1, True)
    shutil.rmtree(store.directory(chain[0]))
    refused = CliRunner().invoke(main, ["attest", "vpmoe", "--key", str(key), "--ancestors"])
    assert refused.exit_code == 1
    assert "leave out --ancestors" in refused.output
    assert CliRunner().invoke(main, ["attest", "vpmoe", "--key", str(key)]).exit_code == 0


def test_a_payload_with_links_and_signatures_through_a_clean_up(store, signer, monkeypatch):
    fingerprint, payload = recipe("synth", variant="with a link")
    with store.work_area("smoke", "synth", fingerprint) as work:
        fill(work, {"a.bin": b"1"})
        (work.payload / "b.bin").symlink_to("a.bin")
        record = store.publish(work, draft(payload))
    said, _ = attestation.attest(store, record, signer)
    command = attestation.strangers_command(store, record, said)
    assert "--allow_symlinks" in command
    assert stranger(command)[0] == 0
    monkeypatch.setattr(collecting, "_YOUNG_S", -1.0)
    kept = attestation.signature_objects(said).values()
    loose = ObjectStore(store.root).put(b"nobody names it", "it")
    going = {path.name for item in collecting.plan(store).items for path in item.paths}
    assert loose in going
    assert going.isdisjoint(kept)
