from hypothesis import given, settings

from tests.trainer.contract.test_canonical import values
from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.volatile import VOLATILE_KEYS, without_volatile


@settings(deadline=None, max_examples=60)
@given(values)
def test_volatile_fields_do_not_change_the_hash_of_a_manifest_at_any_depth(value):
    manifest = {"rows": 3, "splits": {"train": value}}
    noise = dict.fromkeys(VOLATILE_KEYS, "2026-01-31 /home/someone")
    noisy = {"rows": 3, **noise, "splits": {"train": value, **noise}}
    assert sha256_json(without_volatile(noisy)) == sha256_json(without_volatile(manifest))
    assert without_volatile({"rows": 3}) != without_volatile({"rows": 4})
