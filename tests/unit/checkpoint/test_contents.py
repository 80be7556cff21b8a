"""What lies where in a checkpoint, from the names of its leaves alone."""

import pytest

from emaopt.checkpoint import MismatchError
from emaopt.checkpoint._contents import Contents
from emaopt.checkpoint._place import Average, Place


def contents(*names):
    return Contents([tuple(name.split("/")) for name in names], "/run/3")


def paths(mapping):
    return {"/".join(name): "/".join(path) for name, path in mapping.items()}


def path(text):
    return tuple(text.split("/"))


SLOTS = ("opt_state/0/step", "opt_state/0/slots/m/w", "opt_state/0/slots/m/b")
SWAPPED = contents(
    *("params/w", "params/b", *SLOTS, "digests/params", "rest/epoch"),
    *("opt_state/1/step", "opt_state/1/emaopt_swapped", "opt_state/1/shadow/w"),
    *("opt_state/1/residue/w", "opt_state/1/ledger/age"),
)


def test_a_swap_is_undone():
    average = Average(
        at=("opt_state", "1"),
        swapped=True,
        leaves={("w",): ("params", "w")},
        residues={("w",): ("opt_state", "1", "residue", "w")},
        scalars={
            "step": ("opt_state", "1", "step"),
            "ledger/age": ("opt_state", "1", "ledger", "age"),
        },
        rested={},
    )
    assert SWAPPED.averages == {("opt_state", "1"): average}
    assert SWAPPED.called(None) == SWAPPED.called("1") == SWAPPED.called("ema") == [average]
    assert paths(SWAPPED.params) == {"w": "opt_state/1/shadow/w", "b": "params/b"}
    assert paths(SWAPPED.stored_params) == {"w": "params/w", "b": "params/b"}
    assert SWAPPED.places([("w",), ("b",), ("c",)], None) == {
        ("w",): Place(
            path("params/w"), path("opt_state/1/residue/w"), path("opt_state/1/shadow/w")
        ),
        ("b",): Place(path("params/b"), None, path("params/b")),
    }


def test_an_average_that_is_not_swapped_is_in_its_shadow():
    found = contents("s/params/w", "s/opt_state/shadow/w/value", "s/opt_state/step/value")
    assert paths(found.averages["s", "opt_state"].leaves) == {"w": "s/opt_state/shadow/w/value"}
    assert paths(found.params) == {"w": "s/params/w"}


@pytest.mark.parametrize(
    ("leaf", "role"),
    {
        "params/w": "average of w",
        "params/b": "variable",
        "opt_state/1/shadow/w": "raw parameter of w",
        "opt_state/1/residue/w": "residue of w",
        "opt_state/1/step": "global step",
        "opt_state/1/emaopt_swapped": "mark of a swap",
        "opt_state/1/ledger/age": "ledger",
        "opt_state/0/step": "global step",
        "opt_state/0/slots/m/w": "slot m of w",
        "rest/epoch": "rest",
        "digests/params": "digests of params",
    }.items(),
)
def test_the_role_of_a_leaf(leaf, role):
    assert SWAPPED.role(path(leaf)) == role


def network(name, params="params/{}/w", state="opt_state/{}", swapped=False):
    state = state.format(name)
    mark = [f"{state}/1/emaopt_swapped"] if swapped else []
    return [params.format(name), f"{state}/0/slots/m/w", f"{state}/1/step", *mark]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("places", [{}, {"params": "s/{}/params/w", "state": "s/{}/opt_state"}])
def test_two_networks_are_told_apart_by_where_they_stand(places, swapped):
    names = [n for name in ("gen", "disc") for n in network(name, **places, swapped=swapped)]
    state = places.get("state", "opt_state/{}")
    shadows = [f"{state.format(name)}/1/shadow/w" for name in ("gen", "disc")]
    found = contents(*names, *shadows)
    params = places.get("params", "params/{}/w")
    for name in ("gen", "disc"):
        (average,) = found.called(name)
        (at,) = average.leaves.values()
        assert at == path(params.format(name) if swapped else f"{state.format(name)}/1/shadow/w")
        (leaf,) = average.leaves
        assert found.params[leaf] == path(
            f"{state.format(name)}/1/shadow/w" if swapped else params.format(name)
        )


def test_one_of_two_networks_may_be_averaged():
    found = contents(*network("gen"), *network("disc")[:2], "opt_state/gen/1/shadow/w")
    assert paths(found.params) == {"gen/w": "params/gen/w", "disc/w": "params/disc/w"}
    places = found.places([("gen", "w"), ("disc", "w")], None)
    assert paths({name: place.path for name, place in places.items()}) == {
        "gen/w": "opt_state/gen/1/shadow/w",
        "disc/w": "params/disc/w",
    }
    part = found.places([("w",)], None)  # the only part that is averaged
    assert part[("w",)].path == path("opt_state/gen/1/shadow/w")


def test_a_part_that_could_be_any_of_several_is_refused():
    found = contents("params/a/w", "params/b/w", "opt_state/step", "opt_state/shadow/a/w")
    with pytest.raises(MismatchError, match=r"several parts .*params/a, params/b.*Pass the whole"):
        found.places([("w",)], None)


def test_parameters_may_be_called_as_the_fields_of_an_average_are():
    names = ("shadow/w", "step", "color")
    found = contents(
        *(f"params/{name}" for name in names),
        *(f"opt_state/0/slots/m/{name}" for name in names),
        *(f"opt_state/1/shadow/{name}" for name in names),
        "opt_state/1/step",
    )
    assert list(found.averages) == [("opt_state", "1")]
    assert set(found.averages["opt_state", "1"].leaves) == {path(name) for name in names}


def test_an_export_holds_averages_alone():
    found = contents("params/w", "digests/params")
    assert found.called(None) == []
    assert found.places([("w",)], None)[("w",)].path == ("params", "w")


def test_where_nothing_is_averaged_that_is_said():
    with pytest.raises(MismatchError, match=r"/run/3 holds no average. It has opt_state/0, params"):
        contents("params/w", "opt_state/0/w").called(None)
    assert contents("a/params/w", "b/w").root == ("a", "params")


def test_the_name_of_no_average_is_refused_with_those_there_are():
    with pytest.raises(MismatchError, match=r"name='1/opt_state' is no average.* opt_state/1"):
        SWAPPED.called("1/opt_state")


def test_of_several_averages_one_must_be_named():
    names = ("fast/shadow/w", "fast/step", "slow/shadow/w", "slow/step")
    found = contents("params/w", *(f"opt_state/{name}" for name in names))
    with pytest.raises(
        MismatchError, match=r"several averages of 'w'.*opt_state/fast, opt_state/s"
    ):
        found.places([("w",)], None)
    assert found.places([("w",)], "slow")[("w",)].path == path("opt_state/slow/shadow/w")


@pytest.mark.parametrize(
    ("slot", "node"),
    [
        ("0/slots/momentum", "1"),
        ("0/0/mu", "1"),
        ("0/trace", "1"),
        ("opt/0/mu", "avg"),
        ("opt/trace", "avg"),
        ("opt/slots/m", "avg"),
        ("acc_grads", "inner_opt_state/1"),
        ("inner_opt_state/0/slots/m", "inner_opt_state/1"),
    ],
)
@pytest.mark.parametrize("item", ["", "opt_state"])
def test_a_slot_is_never_taken_for_the_parameters(slot, node, item):
    found = contents(f"{item}/{slot}/w", f"{item}/{node}/step", f"{item}/{node}/shadow/w")
    assert found.is_snapshot
    assert not found.params
    assert [place.path for place in found.places([("w",)], None).values()] == [
        path(f"{item}/{node}/shadow/w")
    ]


def test_a_swapped_average_whose_place_is_lost_is_missing():
    marked = [f"opt_state/1/{leaf}" for leaf in ("step", "emaopt_swapped", "shadow/w", "shadow/b")]
    found = contents("params/b", "opt_state/0/slots/m/b", "opt_state/0/slots/m/w", *marked)
    assert found.places([("w",), ("b",)], None).keys() == {("b",)}
    assert paths(found.params) == {"w": "opt_state/1/shadow/w", "b": "opt_state/1/shadow/b"}
    assert contents("opt_state/0/slots/m/w", *marked).places([("w",), ("b",)], None) == {}


@pytest.mark.parametrize("networks", [("0", "1"), ("gen", "disc")])
def test_a_pair_of_parameters_and_states_may_be_saved_as_a_tuple(networks):
    params = [f"/0/{network}/w" for network in networks]
    slots = [f"/1/{network}/0/slots/m/w" for network in networks]
    averages = [f"/1/{network}/1/{leaf}" for network in networks for leaf in ("step", "shadow/w")]
    found = contents(*params, *slots, *averages)
    assert paths(found.params) == {f"{n}/w": f"/0/{n}/w" for n in networks}
    places = found.places([(n, "w") for n in networks], None)
    assert [place.path for place in places.values()] == [
        path(f"/1/{n}/1/shadow/w") for n in networks
    ]
