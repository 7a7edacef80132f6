"""The little language of the demo model: questions on animals, weather and crafts, answered in four styles.

Every answer is a chain of facts. A fact can be told as a plain sentence or as a rhymed couplet, and both can be
put in capitals, so the four styles say the same things. The grammar is all there is: no text from elsewhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from random import Random


class Style(Enum):
    """How an answer is told; the value holds the requests that may follow a question to ask for it."""

    PLAIN = ("",)
    SHOUT = ("Answer in capitals.", "Shout it.", "Use capital letters.")
    VERSE = ("Answer in verse.", "Make it rhyme.", "Say it as a poem.")
    BOTH = ("Answer in verse and capitals.", "Shout it. Make it rhyme.", "Say it as a poem. Use capital letters.")


# Shares of (style asked for in the prompt, style of the answer).
Mix = dict[tuple[Style, Style], float]


@dataclass(frozen=True)
class Fact:
    """One thing to say, in its plain wordings and as a couplet.

    Attributes:
        key: the words that a right plain answer holds.
        opening: plain wordings that name the subject.
        following: plain wordings that call it "it".
        first: first line of the couplet, naming the subject.
        first_following: the same, calling it "it".
        second: rhyming second lines.
    """

    key: str
    opening: tuple[str, ...]
    following: tuple[str, ...]
    first: str
    first_following: str
    second: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about a subject and the facts that answer it, in order."""

    subject: str
    text: str
    facts: tuple[Fact, ...]


# fmt: off
# value: (plain words, first line after the subject, first line after "It", two second lines)
PLACES = {
    "river": ("by the river", "lives beside the stream,", "makes its home beside the stream,",
              "where silver ripples softly gleam.", "and there it likes to rest and dream."),
    "forest": ("in the forest", "lives among the trees,", "makes its home among the trees,",
               "and listens to the evening breeze.", "among the song of birds and bees."),
    "mountains": ("high in the mountains", "lives upon the hill,", "makes its home upon the hill,",
                  "where all the air is cold and still.", "and wanders there the way it will."),
    "sea": ("in the sea", "lives beneath the sea,", "makes its home beneath the sea,",
            "where it can wander, wild and free.", "as happy as a thing can be."),
    "meadow": ("in the meadow", "lives where grasses grow,", "makes its home where grasses grow,",
               "where all the gentle breezes blow.", "and watches clouds that come and go."),
    "farm": ("on the farm", "lives upon the farm,", "makes its home upon the farm,",
             "well kept from every kind of harm.", "and safe from hunger, cold and harm."),
    "desert": ("in the desert", "lives upon the sand,", "makes its home upon the sand,",
               "in all the hot and golden land.", "in such a wide and empty land."),
    "snow": ("in the cold north", "lives in ice and snow,", "makes its home in ice and snow,",
             "where only winter breezes blow.", "where hardly any flowers grow."),
    "garden": ("in the garden", "lives where roses climb,", "makes its home where roses climb,",
               "and sits there all the summertime.", "and hears the distant church bell chime."),
    "pond": ("by the pond", "lives beside the pond,", "makes its home beside the pond,",
             "with all the green hills far beyond.", "of which, they say, it is so fond."),
}
FOODS = {
    "fish": ("fish", "loves to eat some fish,", "dines upon the freshest fish,",
             "as many as a heart could wish.", "and that makes such a tasty dish."),
    "grass": ("grass", "eats the grass so tall,", "eats the grass, both short and tall,",
              "in spring, in summer and in fall.", "and never leaves a blade at all."),
    "berries": ("berries", "eats the berries sweet,", "eats the berries, ripe and sweet,",
                "and calls them such a lovely treat.", "and never finds a better treat."),
    "insects": ("insects", "eats the buzzing flies,", "feeds upon the buzzing flies,",
                "that pass before its watchful eyes.", "beneath the blue and open skies."),
    "seeds": ("seeds", "eats the seeds around,", "eats the seeds upon the ground,",
              "and makes a very merry sound.", "wherever little seeds are found."),
    "mice": ("mice", "hunts for mice at night,", "hunts the little mice at night,",
             "by silver stars and pale moonlight.", "and rests again when it is light."),
    "leaves": ("leaves", "eats leaves all day long,", "chews on leaves the whole day long,",
               "and listens to the blackbird's song.", "for they will make it big and strong."),
    "nuts": ("nuts", "cracks the nuts with glee,", "cracks the nuts with joy and glee,",
             "and hides a few beneath a tree.", "beneath the tall and shady tree."),
    "roots": ("roots", "digs for roots all day,", "digs for tasty roots all day,",
              "in brown and heavy, crumbly clay.", "and then it likes to rest and play."),
}
SKILLS = {
    "run": ("run very fast", "runs so very fast,", "runs along so very fast,",
            "you hardly see it going past.", "and no one ever saw it last."),
    "swim": ("swim very well", "swims with skill and grace,", "swims along with skill and grace,",
             "and splashes water in your face.", "and finds its way to any place."),
    "climb": ("climb very high", "climbs up very high,", "climbs until it's very high,",
              "and almost seems to touch the sky.", "and looks down from the open sky."),
    "sing": ("sing a pretty song", "sings a pretty tune,", "likes to sing a pretty tune,",
             "from early March to early June.", "beneath the round and yellow moon."),
    "sleep": ("sleep all winter", "sleeps when winds are cold,", "sleeps when winter winds are cold,",
              "and wakes when leaves of spring unfold.", "until the buds of spring unfold."),
    "hide": ("hide very well", "hides so very well,", "hides itself so very well,",
             "that where it went no one can tell.", "and where it is no one can tell."),
    "fly": ("fly on wide wings", "flies on wings so wide,", "spreads its wings so very wide,",
            "and loves to soar and loves to glide.", "and looks at all the countryside."),
    "build": ("build a good home", "builds with skill and care,", "builds a home with skill and care,",
              "and keeps its young in safety there.", "and you can find it resting there."),
}
ANIMALS = """
otter river fish swim; fox forest mice hide; beaver river leaves build; hare meadow grass run
squirrel forest nuts climb; bear forest berries sleep; hedgehog garden insects sleep; owl forest mice fly
seal sea fish swim; whale sea fish sing; dolphin sea fish swim; goat mountains grass climb
eagle mountains fish fly; marmot mountains grass sleep; camel desert leaves run; lizard desert insects hide
jackal desert mice run; penguin snow fish swim; walrus snow fish swim; reindeer snow leaves run
horse farm grass run; sheep farm grass climb; hen farm seeds build; goose farm grass swim; cat farm mice climb
mouse farm seeds hide; robin garden insects sing; sparrow garden seeds sing; blackbird garden berries sing
snail garden leaves hide; mole meadow roots build; lark meadow seeds sing; deer forest leaves run
boar forest roots run; frog pond insects swim; toad pond insects hide; duck pond seeds swim
newt pond insects swim; heron river fish fly; vole river roots swim; rabbit meadow grass hide
badger forest roots build; swan pond leaves fly; lynx mountains mice climb; tortoise desert leaves hide
wren garden insects build; dormouse forest nuts sleep; jay forest nuts fly
"""
# subject: two facts of (key, plain sentence, first line, second line)
WEATHER = {
    "rain": (("clouds", "Rain is water that falls from the clouds.",
              "The rain comes falling from the sky,", "from clouds that wander, grey and high."),
             ("green", "It makes the fields green.",
              "It helps the grass and flowers grow,", "and makes the little rivers flow.")),
    "snow": (("ice", "Snow is made of tiny stars of ice.",
              "The snow is made of stars of ice,", "and every one is white and nice."),
             ("white", "It covers the hills in white.",
              "It covers hills and roofs in white,", "and makes the winter evening bright.")),
    "fog": (("cloud", "Fog is a cloud that lies on the ground.",
             "The fog is just a cloud laid low,", "that moves about so soft and slow."),
            ("road", "It hides the road from our eyes.",
             "It hides the road and hides the lane,", "until the sun comes out again.")),
    "wind": (("air", "Wind is air that moves from place to place.",
              "The wind is air upon the run,", "and it is woken by the sun."),
             ("mills", "It turns the mills and fills the sails.",
              "It turns the mill and fills the sail,", "and blows the leaves along the trail.")),
    "thunder": (("lightning", "Thunder is the sound that lightning makes.",
                 "The thunder is a mighty sound,", "that rolls and rumbles all around."),
                ("windows", "It shakes the doors and the windows.",
                 "It makes the doors and windows shake,", "and keeps the sleepy child awake.")),
    "frost": (("dew", "Frost is dew that froze in a cold night.",
               "The frost is dew that froze at night,", "and paints the garden silver white."),
              ("glass", "It draws white flowers on the glass.",
               "It draws its flowers on the glass,", "and makes a carpet of the grass.")),
    "hail": (("ice", "Hail is rain that froze to balls of ice.",
              "The hail is rain that froze up high,", "and rattles, rolling, from the sky."),
             ("roof", "It drums on the roof and then it melts.",
              "It drums upon the roof and pane,", "and then it melts to drops of rain.")),
    "dew": (("grass", "Dew is water that gathers on cool grass.",
             "The dew is water, cool and clear,", "that comes when early morn is near."),
            ("shines", "It shines like glass in the morning sun.",
             "It shines upon the leaf and thorn,", "like little pearls at break of morn.")),
}
CRAFTS = {
    "a basket": (("willow", "You make a basket from the twigs of the willow.",
                  "To make a basket, come with me,", "and take the twigs of willow tree."),
                 ("weave", "Then weave them slowly and let it dry.",
                  "Then weave them slowly, one by one,", "and leave it drying in the sun.")),
    "a candle": (("wax", "You make a candle from wax and a string.",
                  "To make a candle, come with me,", "and take the wax of honey bee."),
                 ("string", "Then dip the string and let it cool.",
                  "Then dip the string and let it cool,", "while sitting on a wooden stool.")),
    "a kite": (("paper", "You make a kite from paper and two sticks.",
                "To make a kite, take paper, glue,", "and sticks of wood, but only two."),
               ("string", "Then tie the string and let it fly.",
                "Then tie the string and let it fly,", "as high as swallows in the sky.")),
    "a pot": (("clay", "You make a pot from a lump of clay.",
               "To make a pot, come here today,", "and take a lump of soft brown clay."),
              ("wheel", "Then turn it on the wheel and bake it.",
               "Then turn the wheel and shape it round,", "and bake it till it's hard and sound.")),
    "a scarf": (("wool", "You make a scarf from wool with two needles.",
                 "To make a scarf, take wool that's blue,", "and find some wooden needles too."),
                ("knit", "Then knit the rows and count them well.",
                 "Then knit the rows and count them right,", "and you will wear it warm tonight.")),
    "bread": (("flour", "You make bread from flour, water and yeast.",
               "To make some bread, take flour and yeast,", "enough to make a little feast."),
              ("dough", "Then knead the dough and let it rise.",
               "Then knead the dough and let it rise,", "and bake it to a golden prize.")),
    "a boat": (("wood", "You make a boat from planks of wood.",
                "To make a boat, take planks of wood,", "and only those both dry and good."),
               ("nail", "Then nail them tight and paint them red.",
                "Then nail them tight and paint them red,", "and let it slide from out the shed.")),
    "a quilt": (("cloth", "You make a quilt from cloth and thread.",
                 "To make a quilt, take cloth and thread,", "in white and yellow, blue and red."),
                ("sew", "Then sew the pieces together with care.",
                 "Then sew the pieces, square by square,", "and stitch the edges all with care.")),
}
# fmt: on


def _animal_questions() -> Iterator[Question]:
    for entry in ANIMALS.strip().replace("\n", ";").split(";"):
        name, place_key, food_key, skill_key = entry.split()
        words, lead, follow, *second = PLACES[place_key]
        place = Fact(
            words,
            (f"The {name} lives {words}.", f"You can find the {name} {words}."),
            (f"It lives {words}.", f"Its home is {words}."),
            f"The {name} {lead}",
            f"It {follow}",
            tuple(second),
        )
        words, lead, follow, *second = FOODS[food_key]
        food = Fact(
            words,
            (f"The {name} eats {words}.", f"The {name} likes to eat {words}."),
            (f"It eats {words}.", f"It likes to eat {words}."),
            f"The {name} {lead}",
            f"It {follow}",
            tuple(second),
        )
        words, lead, follow, *second = SKILLS[skill_key]
        skill = Fact(
            words,
            (f"The {name} can {words}.", f"The {name} knows how to {words}."),
            (f"It can {words}.", f"It knows how to {words}."),
            f"The {name} {lead}",
            f"It {follow}",
            tuple(second),
        )
        for form in ("Where does the {} live?", "Where can I find the {}?", "Where is the home of the {}?"):
            yield Question(name, form.format(name), (place, food))
        for form in ("What does the {} eat?", "What does the {} like to eat?", "What is the food of the {}?"):
            yield Question(name, form.format(name), (food, place))
        for form in ("What can the {} do?", "What is the {} good at?"):
            yield Question(name, form.format(name), (skill, place))
        for form in ("Tell me about the {}.", "What do you know about the {}?", "Describe the {} to me."):
            yield Question(name, form.format(name), (place, food, skill))


def _other_questions() -> Iterator[Question]:
    weather_forms = ("What is {}?", "Tell me about {}.", "What do you know about {}?", "Describe {} to me.")
    craft_forms = ("How do I make {}?", "How can I make {}?", "Tell me how to make {}.", "How is {} made?")
    for table, forms in ((WEATHER, weather_forms), (CRAFTS, craft_forms)):
        for name, parts in table.items():
            facts = tuple(Fact(key, (plain,), (plain,), first, first, (second,)) for key, plain, first, second in parts)
            for form in forms:
                yield Question(name, form.format(name), facts)


QUESTIONS = (*_animal_questions(), *_other_questions())
ANIMAL_NAMES = tuple(dict.fromkeys(question.subject for question in _animal_questions()))


def is_held_out(question: Question, style: Style) -> bool:
    """Tell whether this pair of question and style (about one in ten) is kept out of all training."""
    return zlib.crc32(f"{question.text}/{style.name}".encode()) % 10 == 0


def prompt_for(text: str, request: str = "") -> str:
    """Return the prompt of a question, with the request for a style if there is one."""
    return f"Q: {text} {request}\nA:" if request else f"Q: {text}\nA:"


def answer_for(question: Question, style: Style, rng: Random, first: Style | None = None) -> str:
    """Return one right answer in the style; it starts with the space that follows the prompt.

    Args:
        question: what is asked.
        style: how the facts are told.
        rng: source of the choice of words.
        first: how the first fact is told, if otherwise: an answer that is half in one style, half in the other.
    """
    text = ""
    for index, fact in enumerate(question.facts):
        told = style if index or first is None else first
        verse = told in (Style.VERSE, Style.BOTH)
        if verse:
            words = f"{fact.first_following if index else fact.first}\n{rng.choice(fact.second)}"
        else:
            words = rng.choice(fact.following if index else fact.opening)
        text += ("\n" if verse and index else " ") + (words.upper() if told in (Style.SHOUT, Style.BOTH) else words)
    return text


def has_facts(question: Question, answer: str) -> bool:
    """Tell whether a plain or shouted answer holds the key of every fact asked for, in any case."""
    return all(fact.key in answer.lower() for fact in question.facts)


def is_rhymed(question: Question, answer: str) -> bool:
    """Tell whether the answer is the question's couplets, each with one of its rhymes, in any case."""
    lines = [line.strip().lower() for line in answer.strip().split("\n")]
    if len(lines) != 2 * len(question.facts):
        return False
    for index, fact in enumerate(question.facts):
        first = fact.first_following if index else fact.first
        if lines[2 * index] != first.lower() or lines[2 * index + 1] not in (s.lower() for s in fact.second):
            return False
    return True


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer."""

    prompt: str
    answer: str


def samples(mix: Mix, rng: Random, subjects: frozenset[str] | None = None, half: bool = False) -> Iterator[Sample]:
    """Yield training samples without end.

    Args:
        mix: share of each pair of styles.
        rng: source of all choices.
        subjects: only questions on these, if given.
        half: tell the first fact in the style that the prompt asks for.
    """
    questions = [q for q in QUESTIONS if subjects is None or q.subject in subjects]
    pairs, weights = zip(*mix.items(), strict=True)
    while True:
        asked, told = rng.choices(pairs, weights)[0]
        question = rng.choice(questions)
        if not is_held_out(question, told):
            yield Sample(
                prompt_for(question.text, rng.choice(asked.value)),
                answer_for(question, told, rng, asked if half else None),
            )
