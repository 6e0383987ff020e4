"""A few rounds of the fuzz script, which CI runs for a minute: nothing damaged ends raw."""

from tests import fuzz


def test_a_moment_of_every_kind_finds_nothing_raw(capsys):
    assert fuzz.run(["--seconds", "5", "--seed", "11"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*fuzz.KINDS]
    assert all(line.endswith("0 raw") for line in lines)


def test_what_is_raw_or_hangs_is_found_and_what_is_refused_is_not(monkeypatch, capsys):
    def broken(self, draw):
        raise [KeyError("x"), fuzz.cp.CachepressError("refused")][draw.randrange(2)]

    monkeypatch.setattr(fuzz.Fuzz, "spelling", broken)
    assert fuzz.run(["--seconds", "0.2", "--kinds", "spelling"]) == 1
    out = capsys.readouterr().out
    assert "KeyError in test_fuzz.py" in out and "refused" not in out
    assert "python -m tests.fuzz --seed 0 --kinds spelling --case 0" in out
    monkeypatch.setattr(fuzz, "SLOW", 0.01)
    monkeypatch.setattr(fuzz.Fuzz, "spelling", lambda self, draw: fuzz.time.sleep(5))
    assert fuzz.run(["--seconds", "0.1", "--kinds", "spelling", "--case", "3"]) == 1
    assert "TimeoutError" in capsys.readouterr().out
