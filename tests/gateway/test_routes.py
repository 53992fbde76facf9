"""The model of a gateway: what is taken from the apps and the file, and what is refused, with both names."""

import pytest

from stentor import App, Event, Message
from stentor.errors import ConfigError, DuplicateType, StentorError
from stentor.gateway.routes import Model, Rate, make, read_settings
from tests.gateway.bus import PAID, PLACED, Paid, Placed, Sent, apps

PLACES = "[services]\nshop = ['127.0.0.1:1']\nbilling = ['127.0.0.1:2']\nstore = ['h:3']\ngateway = ['[::1]:4']\n"


def model(toml: str = "", made: list[App] | None = None, places: str = PLACES) -> Model:
    return make(apps() if made is None else made, read_settings(f"{toml}\n{places}", "gateway.toml"))


def test_routes_and_publishers_are_those_of_the_apps() -> None:
    found = {route.type: route for route in model().routes}
    assert found.keys() == {PLACED, PAID}
    assert (found[PLACED].to, found[PLACED].topic, found[PLACED].key) == (("billing",), "orders", "order")
    assert (found[PAID].to, found[PAID].grade) == (("shop", "store"), "relay")
    assert model().publishers == {"shop": (PLACED,), "billing": (PAID,)}


def test_former_names_of_a_type_have_its_route() -> None:
    class Moved(Event, topic="t", type="now", also=("then",)): ...

    shop = App("shop")

    @shop.on(Moved)
    async def see(moved: Moved) -> None: ...

    places = "[services]\nshop = ['127.0.0.1:1']\ngateway = ['127.0.0.1:2']"
    assert [route.type for route in model(made=[shop], places=places).routes] == ["now", "then"]


def test_the_closest_pattern_counts() -> None:
    toml = f"""
    [types."com.shop.*"]
    broadcast = "mirror"
    limit = "9/m"
    [types."com.shop.order.*"]
    limit = "100/s"
    [types."{PAID}"]
    broadcast = "acked"
    """
    found = {route.type: route for route in model(toml).routes}
    assert (found[PAID].grade, found[PAID].limit) == ("acked", Rate(100, 1))
    assert (found[PLACED].grade, found[PLACED].limit) == ("mirror", Rate(100, 1))


def test_what_has_no_route_is_told() -> None:
    made = apps()

    @made[0].on(topic="logs")
    async def read(message: Message) -> None: ...

    assert model(made=made).notes == ("shop: read takes the whole topic logs, which has no route",)


def test_what_an_app_delivers_leaves_it_and_is_not_routed_back() -> None:
    made = apps()
    made[1].deliver(Sent, to="http://127.0.0.1:8080/events")
    with pytest.raises(ConfigError, match=r"store publishes 'com\.shop\.parcel\.sent', which no app here handles"):
        made[2].publishes(Sent)
        model(made=made)
    made = apps()
    made[1].deliver(Paid, to="http://127.0.0.1:8080/events")
    assert {route.type: route.to for route in model(made=made).routes}[PAID] == ("shop", "store")
    assert model(made=made).publishers["billing"] == (PAID,)


def two_owners() -> list[App]:
    made = apps()
    made[2].publishes(Placed)
    return made


def two_keys() -> list[App]:
    class Other(Event, topic="orders", key="customer", type=PLACED):
        customer: str

    made = apps()

    @made[2].on(Other)
    async def see(order: Other) -> None: ...

    return made


def unheard() -> list[App]:
    class Odd(Event, topic="t", type="com.odd"): ...

    made = apps()
    made[2].publishes(Odd)
    return made


@pytest.mark.parametrize(
    ("made", "kind", "complaint"),
    [
        (two_owners, DuplicateType, f"shop and store both claim to publish '{PLACED}'"),
        (two_keys, DuplicateType, f"shop keys '{PLACED}' by order, store by customer"),
        (unheard, ConfigError, "store publishes 'com.odd', which no app here handles"),
        (lambda: [*apps(), App("shop")], ConfigError, "two apps are called 'shop'"),
        (lambda: [*apps(), App("gateway")], ConfigError, "the relay's name"),
    ],
)
def test_apps_that_contradict_each_other_are_refused(made: object, kind: type[StentorError], complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        model(made=made())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("toml", "places", "complaint"),
    [
        ("", "[services]\nshop = ['127.0.0.1:1']", r"goes to store, which has no address: write store = \['HOST"),
        ("", PLACES.replace("gateway", "#"), f"{PAID} goes to several services through the relay"),
        ("broadcast = 'acked'", PLACES.replace("gateway", "#"), "unknown types go to gateway, which has no address"),
        ("dead_letter = 'bin'", PLACES, "unknown types go to bin, which has no address"),
        ("", PLACES + "ghost = ['127.0.0.1:9']", "services.ghost is no app here, and no route leads there"),
        ("", PLACES + "'a b' = ['127.0.0.1:9']", "a name has letters"),
        ("", PLACES.replace("127.0.0.1:2", "127.0.0.1"), "services.billing: '127.0.0.1' is no HOST:PORT"),
        ("", PLACES.replace("['127.0.0.1:2']", "[]"), "services.billing has no address"),
        ("", PLACES.replace("'127.0.0.1:2'", "'h:2', 'h:2'"), "services.billing names an address twice"),
        ("listen = 'here'", PLACES, "listen: 'here' is no HOST:PORT"),
        ("[[routes]]\ntype = 'x'\nto = ['nobody']", PLACES, "x goes to nobody, which has no address"),
        ("[[routes]]\ntype = 'x'\nto = []", PLACES, r"route 1 \(x\) leads to no service"),
        ("[[routes]]\nto = ['shop']\ndata = {'a b' = 1}", PLACES, "'a b' is no field of the data"),
        ("[types.nothing]\nlimit = '1/s'", PLACES, "types.'nothing' is set, but no app here handles such a type"),
        ("[types.'com.*']\nlimit = '1 a day'", PLACES, "'1 a day' is no rate"),
        ("[publishers]\ntill = ['com.shop.*']", PLACES, "nothing tells who they are"),
        ("[jwt]\nissuer='i'\naudience='a'\njwks='j'\n[publishers]\ntill = ['x']", PLACES, "'till' may publish 'x'"),
        ("colour = 'red'", PLACES, "gateway.toml: .*`colour`"),
        ("broadcast = 'loud'", PLACES, "gateway.toml: Invalid enum value 'loud'"),
        ("listen = ", PLACES, "gateway.toml: "),
    ],
)  # fmt: skip
def test_settings_that_lead_nowhere_are_refused(toml: str, places: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        model(toml, places=places)
