import pytest

from triptych.scripts import bench_recsys


def test_without_cornac_the_bench_says_how_to_get_it_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(bench_recsys, "find_spec", lambda name: None)
    assert bench_recsys._cornac() is None
    assert "cornac is not installed (pip install cornac==3.0.1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row", [[0, 1, 1], [0, 1, -1], [0, 1, 9], [0, 1]], ids=["twice", "none", "unknown", "few"]
)
def test_beams_that_are_not_as_many_items_of_the_catalogue_end_the_bench(row):
    work = {"width": 3, "users": 2, "num_items": 9}
    bench_recsys._check_legal("here", [[0, 1, 2], [8, 7, 6]], **work)
    with pytest.raises(SystemExit, match=r"users get \[3, 2\] items of the catalogue, not 3 each"):
        bench_recsys._check_legal("here", [[0, 1, 2], row], **work)


def test_a_user_at_a_time_is_given_what_all_together_are():
    work = {"width": 4, "users": 3, "length": 5, "num_items": 50, "tokens": "codes"}
    together, single = bench_recsys.decode_ours(**work), bench_recsys.decode_ours(**work, together=1)
    assert single["items"] == together["items"]
    assert single["logp"] == [pytest.approx(row, abs=1e-4) for row in together["logp"]]


def test_cornacs_decoder_gives_items_of_the_catalogue():
    pytest.importorskip("cornac", reason="cornac is not installed")
    found = bench_recsys.decode_cornac(width=4, users=2, length=5, num_items=50)
    bench_recsys._check_legal("cornac", found["items"], width=4, users=2, num_items=50)
