"""MaskedSum v1, byte by byte: the test vectors of the design.

Three sites with fixed identities and epoch secrets; the HKDF and CTR values of the vectors agree
with an independent HMAC implementation and with OpenSSL.
"""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkola.privacy import frames, keys, masks, shamir
from fedkola.privacy.keys import Epoch

EPOCH, X, THRESHOLD = 1, 7, 3
NAMES = ("alpha", "beta", "gamma")
IDENTITIES = [Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2, 3)]
ROSTER = keys.roster(
    bytes(range(16)),
    bytes(32),
    [(n, k.public_key().public_bytes_raw()) for n, k in zip(NAMES, IDENTITIES, strict=True)],
)
EPOCHS = [
    Epoch(roster=ROSTER, number=EPOCH, first=X, count=1, secret=bytes([secret]) * 32)
    for secret in (0x10, 0x20, 0x30)
]
OFFERS = {
    i: frames.Offer(
        run=ROSTER.run,
        roster_hash=ROSTER.hash,
        epoch=EPOCH,
        first=X,
        site=i,
        channel=keys.public_of(one.channel()),
        exchanges=(keys.public_of(one.pair(X)),),
        plan_hash=bytes(32),
        manifest_hash=bytes(32),
    )
    for i, one in enumerate(EPOCHS)
}


def seed(i: int, j: int) -> bytes:
    return keys.pair_seed(ROSTER, EPOCHS[i].pair(X), OFFERS[j].public(X), EPOCH, X, i, j)


def masked(i: int, words: np.ndarray, *, word: int = 16) -> masks.Words:
    """y_i, as the design writes it down."""
    found = words.astype(masks.MEMORY[word])
    own = keys.stream_key(ROSTER, EPOCHS[i].own(X), EPOCH, X, 0)
    pairs = {j: keys.stream_key(ROSTER, seed(i, j), EPOCH, X, 0) for j in range(3) if j != i}
    masks.add_streams(
        found,
        plus=[own, *(key for j, key in pairs.items() if j > i)],
        minus=[key for j, key in pairs.items() if j < i],
    )
    return found


def test_the_roster_has_its_hash():
    assert ROSTER.hash.hex() == "63f790cd0d887f6ef30a8c18411a526f1d4dbbfe9de1cd65bdfefbbc2bc4f5f7"


def test_key_pairs_and_seeds_are_derived_from_the_epoch_secret():
    alpha = EPOCHS[0]
    found = {
        "a": alpha.pair(X).hex(),
        "A": OFFERS[0].public(X).hex(),
        "b": alpha.own(X).hex(),
        "C": OFFERS[0].channel.hex(),
    }
    assert found == {
        "a": "470bb4920ebafe4b97dface04ebeaf6ed0360bd6fe626fc55392cce1eac2ea1c",
        "A": "8dc83b3b863edd60f376432df03cc7016a42dfd7c0a0ac4818ec4f5de2fe5b1a",
        "b": "d5b2ad9e6c3ae06c789a01f87232756204c1ff70d3509d0afe636dd3ea13c634",
        "C": "52e87f1405e6a18db38531cf31f323892d3e6b18274431e072c48dc4ba9cfd4f",
    }


@pytest.mark.parametrize(
    ("i", "j", "wanted"),
    [
        (0, 1, "a791ad6d58d7ee50f96c0622495607afa5a03f22266f7015a050436f1d99ae9a"),
        (0, 2, "556a4cd849c3c79842eaedb2d8bbdf4e08d4f957c03ce49b92fee6bfae2e6e7e"),
        (1, 2, "e3ca28bc1f4da6730db3d73d6ba325e0cc5334188266063768030b0b79c42c8d"),
    ],
)
def test_both_ends_of_a_pair_have_the_same_seed(i: int, j: int, wanted: str):
    assert (seed(i, j).hex(), seed(j, i).hex()) == (wanted, wanted)


def test_a_stream_key_gives_these_words():
    key = keys.stream_key(ROSTER, EPOCHS[0].own(X), EPOCH, X, 0)
    assert key.hex() == "34f5250e424e9036a3d2d1bc02884a432631e4786cebefd409105060aaade51b"
    content = masks.stream(key, 16)
    assert content.hex() == "271def7d9e47e34a0d4971df515fb1e1"
    assert np.frombuffer(content, dtype="<u2")[:4].tolist() == [7463, 32239, 18334, 19171]
    assert np.frombuffer(content, dtype="<u4")[:2].tolist() == [2112822567, 1256408990]


def test_three_sites_mask_and_their_masks_cancel():
    words = [[1, -2, 3, 2047], [10, 20, -30, -2047], [100, -200, 300, 5]]
    y = [masked(i, np.array(one)) for i, one in enumerate(words)]
    assert [one.tobytes().hex() for one in y] == [
        "0d848907c832abd4",
        "7fdc0737876d9a90",
        "ab45af7c35f4e4a1",
    ]
    total = y[0] + y[1] + y[2]
    own = [keys.stream_key(ROSTER, one.own(X), EPOCH, X, 0) for one in EPOCHS]
    masks.add_streams(total, plus=(), minus=own)
    assert masks.signed(total, 16).tolist() == [111, -182, 273, 5]


def test_a_mask_goes_on_over_its_chunks():
    words = np.arange(200_001) % 4095 - 2047
    digest = hashlib.sha256(masked(1, words).tobytes()).hexdigest()
    assert digest == "a18edc78ee0bc30b03ab092a20571d3d9720308d11990a06dfd7b56e77c664a2"


def test_offers_are_signed_and_hashed():
    digest = frames.offers_hash(OFFERS).hex()
    assert digest == "5eedb2c612892ff8852ecf3f20f933f80b73a6c22838931bd21d574600224f20"
    body = OFFERS[0].pack()
    signature = IDENTITIES[0].sign(body).hex()
    assert len(body) == 206
    assert (signature[:16], signature[-8:]) == ("36805d8a246b4e30", "d374190e")
    assert frames.Offer.unpack(body) == OFFERS[0]


def test_shares_are_sealed_for_their_holder():
    (own,) = EPOCHS[0].shares(X, keys.SELF, THRESHOLD, [1])
    (pair,) = EPOCHS[0].shares(X, keys.PAIR, THRESHOLD, [1])
    assert len(own) == 66
    assert (own.hex()[:16], own.hex()[-12:]) == ("0199e881a6ad3d1c", "c2362e93d8ca")
    digest = frames.offers_hash(OFFERS)
    sealed = keys.seal(EPOCHS[0], own + pair, 0, 1, OFFERS[1].channel, digest)
    assert (len(own + pair), len(sealed)) == (132, 148)
    found = hashlib.sha256(sealed).hexdigest()
    assert found == "205aa398f0f51af30e56be553c1bda5db70d60803bf337867f447fc07164cdf9"
    assert keys.unseal(EPOCHS[1], sealed, 0, 1, OFFERS[0].channel, digest) == own + pair


def test_three_shares_give_the_seed_back_and_two_do_not():
    shares = dict(enumerate(EPOCHS[0].shares(X, keys.SELF, THRESHOLD, range(3))))
    secret = shamir.joined(shares, THRESHOLD)
    assert secret.to_bytes(32, "big") == EPOCHS[0].own(X)
    with pytest.raises(Exception, match="takes 3"):
        shamir.joined({0: shares[0], 1: shares[1]}, THRESHOLD)
