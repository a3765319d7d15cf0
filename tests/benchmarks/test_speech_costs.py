"""What benches of speech measure costs by."""


def test_exponents_are_fitted_over_lengths_that_all_arms_had(costs):
    def points(power, *lengths):
        return [{"length": x, "seconds": 2.0 * x**power} for x in lengths]

    found = {"a": points(1, 5, 20, 40, 80), "b": points(2, 5, 20, 30, 40)}
    over = costs.shared(found, 20)
    assert over == [20, 40]
    one, other = (costs.length_row(each, "seconds", over, [5, 40, 80]) for each in found.values())
    assert one == {"exponent, 20 to 40 s": 1, "5 s": 10, "40 s": 80, "80 s": 160}
    assert other["exponent, 20 to 40 s"] == 2 and other["80 s"] == "too much memory"
    assert list(costs.length_row(found["a"], "seconds", [20], [5])) == ["5 s"]
