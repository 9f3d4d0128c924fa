"""The kill campaign: six kills in every test run, a hundred with `-m slow`."""

import dataclasses

import pytest

from benchmarks.measure import machine
from tests.faults import campaign
from tests.faults.campaign import Campaign, Kill


def run(folder, kills, seed):
    """Run a campaign and assert that every kill is survived."""
    said = []
    found = Campaign(folder, seed, said.append)
    found.resume(kills)
    troubles = [kill for kill in found.kills if not kill.survived]
    assert not troubles, troubles[0].trouble
    return found


def test_a_few_kills_are_survived_and_a_run_that_ends_elsewhere_is_noticed(tmp_path):
    found = run(tmp_path, 6, seed=1)
    assert len(found.kills) == 6 and {kill.subject for kill in found.kills} >= {"pretraining", "fine-tuning"}
    pretrain, finetune = found.subjects[:2]
    other = dataclasses.replace(pretrain, words=[*pretrain.words, "--seed", 1])
    found.run(other, 1)
    assert not found.kills[-1].survived and found.kills[-1].trouble


@pytest.mark.slow
def test_a_hundred_kills_are_survived(tmp_path):
    found = run(tmp_path, 100, seed=7)
    assert len({kill.where for kill in found.kills}) == 8, "all places, and two processes"


def test_the_table_counts_what_was_survived_and_what_it_cost():
    kills = [
        Kill("pretraining", "a random step", 1, 0, 2, 5, 4, 0.25, survived=True),
        Kill("fine-tuning", "a random step", 2, 2, 3, 9, 6, 0.75, survived=False, trouble="losses differ"),
        Kill("pretraining", "inside a save", 1, 0, 1, 7, 7, 0.5, survived=True),
    ]
    rows = {row["where"]: row for row in campaign.summary(kills)}
    assert [rows[where]["injected"] for where in ("a random step", "inside a save", "all")] == [2, 1, 3]
    assert [rows[where]["survived"] for where in ("a random step", "inside a save", "all")] == [1, 1, 2]
    assert rows["all"]["by_subject"] == {"fine-tuning": 1, "pretraining": 2} and rows["all"]["with_workers"] == 1
    assert rows["all"]["most_steps_done_again"] == 3
    assert (rows["all"]["median_seconds_lost"], rows["all"]["most_seconds_lost"]) == (0.5, 0.75)
    result = {"machine": machine("cpu"), "setting": {"seed": 0}, "took_seconds": 60.0, "runs": 2, "kills": kills}
    table = campaign.markdown(result | {"summary": campaign.summary(kills)})
    assert "| a random step | 1 | 1 | 1 | 2 | 1 | some | 3 | 0.50, 0.75 |" in table
    assert "| inside a save | 0 | 1 | 0 | 1 | 1 | 0 | 0 | 0.50, 0.50 |" in table
