"""Functions that fine-tuning, probes and segmentation share."""

import pytest

from programs.transfer import require_same_numbers


def test_classes_that_are_compared_by_number_must_have_the_same(caplog):
    require_same_numbers(["ant", "bee", "cat"], ["ant", "bee", "cat"], "the teacher")
    require_same_numbers([], ["ant", "bee"], "the teacher")
    assert not caplog.records
    with pytest.raises(
        ValueError, match="bee is class 1 of the teacher, and class 0 of the data: .* in the same order"
    ):
        require_same_numbers(["ant", "bee"], ["bee", "ant"], "the teacher")
    require_same_numbers(["ant", "bee", "cat"], ["ant", "n02", "n03"], "the teacher")
    assert "2 classes have other names in the teacher, and classes are compared by number: n02 = bee, n03 = cat" in (
        caplog.text
    )
