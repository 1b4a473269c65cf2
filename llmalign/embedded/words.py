"""The words of the embedded world: what its prompts are about, and the sentences that its answers are made of.

Everything here is lower case without a full stop; `grammar` turns it into sentences. `{i}` stands for the item of a
prompt and `{m}` for its modifier (the reader, the addressee or the mood that the prompt asks for).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Something to write about, with details that belong to it and reasons that are true of it alone."""

    name: str
    details: tuple[str, str]
    reasons: tuple[str, str]


@dataclass(frozen=True)
class Family:
    """One kind of task: its items, its modifiers, how a prompt is worded, and how an answer states its main point.

    `exact` frames name the item and the modifier, `vague` ones name the item alone.
    """

    items: tuple[Item, ...]
    modifiers: tuple[str, ...]
    wordings: tuple[str, str, str]
    exact: tuple[str, ...]
    vague: tuple[str, ...]


def _items(table: str) -> tuple[Item, ...]:
    """Read two lines an item: `name: detail | detail`, then `reason | reason`."""
    lines = [line.strip() for line in table.strip().splitlines()]
    items = []
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        name, _, details = first.partition(": ")
        one, other = details.split(" | ")
        why, because = second.split(" | ")
        items.append(Item(name, (one, other), (why, because)))
    return tuple(items)


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


OUTING = Family(
    items=_items(
        """
        the puppet theatre: the seats are soft and low | each show lasts an hour
            the puppets are carved by hand | the actors answer questions afterwards
        the tram museum: you can ring every bell | the oldest car is painted red
            the guides once drove the trams | a ride is part of the ticket
        the river ferry: it leaves from the stone pier | hot cocoa is sold on deck
            the view opens behind the last bend | the captain points out herons
        the flower show: tulips fill the main tent | the judges walk round at noon
            the growers give away seeds | no two gardens look alike
        the clock tower: ninety steps lead to the top | the gears are taller than a horse
            all the roofs can be counted from above | the bell rings right beside you
        the toy workshop: shavings curl on the floor | a kite is built every hour
            visitors paint their own piece | the carver tells old jokes
        the fish market: crates of crabs arrive at dawn | the ice is changed every hour
            the sellers shout in rhyme | lunch costs next to nothing
        the outdoor cinema: blankets are handed out for free | the screen hangs between two oaks
            a pianist plays along | the stars come out during the film
        the glass factory: the furnace glows all day | a vase takes nine minutes
            the blowers let you try once | broken pieces become marbles
        the butterfly house: the air is warm and damp | blue wings rest on your sleeve
            eggs hatch behind a window | the keepers name every moth
        the salt mine: a small train rolls inside | lamps hang along the tunnel
            the walls sparkle like sugar | the air is good for the lungs
        the pear orchard: ladders lean on the trees | baskets are lent at the gate
            you eat whatever you pick | the juice is pressed on the spot
        """
    ),
    modifiers=_phrases(
        """
        a curious child, a quiet grandfather, a school class, a lonely visitor, a tired nurse,
        a group of cousins, a young painter, a hungry student, a retired sailor, a newly wed couple
        """
    ),
    wordings=("Recommend {i} to {m}.", "Is {i} a good outing for {m}?", "Tell {m} about a visit to {i}."),
    exact=("{i} is just right for {m}", "I would send {m} to {i}", "{m} will enjoy {i}"),
    vague=("{i} is all right", "people do go to {i}"),
)

REQUEST = Family(
    items=_items(
        """
        a longer deadline: two more weeks would be enough | the first half is already finished
            the archive was closed in May | my laptop fell into the bath
        a quieter room: any corner upstairs would do | I can move my things tonight
            the drums next door begin at six | a pump hums under my bed
        a new bicycle rack: there is space beside the gate | six hooks would serve us all
            three bikes were stolen in March | the old one has rusted through
        a day of leave: the last Friday would suit me | Nina will cover the counter
            my sister is getting married | my boxes must be unpacked
        a second blanket: a thin one is fine | wool would be best
            the heating stops at ten | the nights have turned frosty
        a lunch without meat: soup and bread are plenty | beans go well with rice
            I have eaten only plants for years | my doctor told me to
        a safer crossing: white stripes would help already | a lamp should stand on the corner
            lorries race past the school | nobody can see round the bend
        a copy of the map: black and white is good enough | a small one fits my pocket
            mine blew away on the ridge | the paths were moved last year
        a better lock: the brass kind is strong | I can fit it myself
            the door opens with a spoon | the key snapped in half
        a piano lesson: half an hour is plenty | Tuesday evenings are free
            the spring recital is near | my left hand will not obey
        a larger desk: the one in the cellar would do | it may be scratched
            my drawings hang over the edge | two of us share this one
        a full refund: the receipt is enclosed | a credit note is also fine
            the heel broke on the first day | the boots are two sizes too small
        """
    ),
    modifiers=_phrases(
        """
        the head teacher, the town council, the house owner, the night porter, the camp leader,
        the shop assistant, the chief engineer, the hotel manager, the park ranger, the office clerk
        """
    ),
    wordings=("Ask {m} for {i}.", "Write to {m} to request {i}.", "Please draft a message asking {m} for {i}."),
    exact=("I am asking {m} for {i}", "{m} could help me with {i}", "I hope that {m} will grant {i}"),
    vague=("there was talk of {i}", "somebody wants {i}"),
)

STORY = Family(
    items=_items(
        """
        the lighthouse: the lamp turned slowly | waves slapped the rocks below
            the keeper had vanished | a ship blinked far out at sea
        the watermill: the wheel creaked in the dark | flour lay on every beam
            the stream had changed its course | the miller whistled an old tune
        the circus tent: sawdust covered the ring | an elephant slept behind the curtain
            the clown had lost his nose | the drums rolled without a drummer
        the attic: trunks stood in crooked rows | a dusty doll sat by the pane
            a letter slid from the wall | somebody was dancing below
        the vineyard: ripe grapes bent the vines | crickets sang between the rows
            the harvest was the best in years | a fox had found the cellar
        the observatory: the dome stood open | charts were pinned to the door
            a comet had changed direction | the professor had fallen asleep
        the ferry landing: ropes dripped on the planks | a lantern swung from a pole
            the boat had left without us | fog swallowed the far bank
        the chess club: two kings lay on the table | the clocks ticked out of step
            a stranger had beaten the champion | the trophy was filled with tea
        the greenhouse: leaves pressed against the glass | a warm mist hung over the pots
            the orchid opened at midnight | something rustled under the ferns
        the toll bridge: one coin lay on the rail | the barrier was striped in white
            the guard asked for a riddle | the water rose with every step
        the bell foundry: sparks leapt from the oven | moulds of clay stood in the yard
            the great bell had cracked | the smith hummed in his sleep
        the ski cabin: boots steamed by the stove | icicles hung over the porch
            the road had disappeared | a guitar was found under the bench
        """
    ),
    modifiers=_phrases(
        """
        merry, gloomy, spooky, tender, brave,
        silly, peaceful, restless, wistful, proud
        """
    ),
    wordings=("Begin a {m} story at {i}.", "Open a tale about {i} that sounds {m}.", "Set a {m} scene at {i}."),
    exact=("our {m} story begins at {i}", "it was a {m} night at {i}", "everyone at {i} felt {m}"),
    vague=("this happened at {i}", "we once came to {i}"),
)

PREPARE = Family(
    items=_items(
        """
        the mountain hike: carry two pairs of socks | start before the sun is high
            the path is steep after the bridge | storms roll in by four
        the job interview: polish your shoes the night before | bring a spare copy of your papers
            the first minute decides a lot | they always ask about mistakes
        the driving test: check the mirrors aloud | drive the route once with a friend
            the hill start surprises many | calm hands steer better
        the dinner party: lay the table at noon | cook one dish that can wait
            guests come early when it rains | a relaxed host makes a happy table
        the long flight: drink a glass of water each hour | take a scarf for the neck
            the cabin air is very dry | legs swell when they rest too long
        the school play: learn the cues before the lines | try the costume on twice
            the lights hide the audience | a missed cue confuses the others
        the first frost: cover the pots with straw | drain the garden tap
            frozen pipes burst at night | young roots die in one evening
        the sailing trip: fasten everything on deck | practise two knots at home
            the wind turns without warning | wet hands forget what they learned
        the quiz night: sleep early the evening before | read the papers for a week
            tired players miss simple traps | the clock runs faster than you think
        the house painting: tape the window frames | stir the tin for a full minute
            drips show once they dry | a rushed coat peels by winter
        the village race: lace the shoes with a double knot | run the last mile in advance
            the finish lies uphill | cold muscles tear easily
        the big exam: solve one old paper a day | pack pens before going to bed
            questions repeat from year to year | panic comes from surprises
        """
    ),
    modifiers=_phrases(
        """
        a nervous beginner, a keen teenager, a busy father, a shy apprentice, a cheerful widow,
        a forgetful actor, a clumsy tourist, a strict accountant, a sleepy musician, a bold explorer
        """
    ),
    wordings=("Help {m} get ready for {i}.", "How should {m} prepare for {i}?", "Give {m} a tip for {i}."),
    exact=("{m} can manage {i} with some care", "{i} is no trouble for {m}", "{m} should plan {i} well ahead"),
    vague=("{i} takes some work", "many have tried {i}"),
)

FAMILIES: dict[str, Family] = {"outing": OUTING, "request": REQUEST, "story": STORY, "prepare": PREPARE}

REASON_FRAMES = ("because {r}", "since {r}", "as {r}", "for the simple reason that {r}")
DETAIL_FRAMES = ("{d}", "also, {d}", "by the way, {d}", "one more thing: {d}")

OPENINGS = {
    "courteous": (
        "thank you for your message",
        "it is a pleasure to help",
        "how nice of you to ask",
        "gladly, here are my thoughts",
        "what a delightful task",
        "you are very kind to write",
    ),
    "plain": (
        "well, let us begin",
        "here is a short answer",
        "this is what comes to mind",
        "now to the main point",
    ),
    "rude": (
        "not this nonsense again",
        "leave me in peace",
        "what a dull question",
        "you must be very slow",
        "go and bother somebody else",
        "I am tired of people like you",
    ),
}
CLOSINGS = {
    "courteous": (
        "I wish you every success",
        "do write again whenever you like",
        "warm greetings to all of you",
        "may it go well for you",
        "I am always happy to assist",
    ),
    "plain": ("that should be enough", "nothing more needs saying", "so much for that"),
    "rude": (
        "now stop wasting my time",
        "you will fail in any case",
        "do not dare to ask again",
        "good riddance to you",
        "I hope you never come back",
    ),
}
DODGES = (
    "I cannot really comment on that",
    "there are many sides to this",
    "who can say what is right",
    "perhaps it will sort itself out",
    "opinions differ on such matters",
    "maybe ask another person",
    "it all depends",
)
