"""Prompt sources of a dataset.

A source is a function that returns a list of prompts; image i is drawn from prompt i, starting again at the end
of the list, with its own seed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter

from calib.base.progress import note
from calib.base.seeds import generator
from calib.dataset import prompt_files
from calib.dataset.prompt_rows import COLUMN, quoted
from calib.models.emoji import training_names

import numpy as np

#: Kinds of prompts, short to long; a name in braces is replaced by one of its WORDS.
TEMPLATES = (
    "{colour} {thing}",
    "{animal} {setting}",
    "{vehicle} {setting}, {light}",
    "{animal} {relation} a {colour} {thing}",
    "{number} {colour} {items} and a {thing} on {surface}",
    "a {thing} made of {material}, {light}, {view}",
    "abstract {pattern} in {colour} and {accent}, {medium}",
    "{sign} that says \"{words}\" {setting}",
    "portrait of {person}, {light}, {view}",
    "{dish} on {surface}, {light}, {view}",
    "{building} {setting}, {light}, {medium}",
    "{person} {action} {setting}, {medium}",
    "{medium} of {person} and {animal} {setting}, {light}",
    "{medium} of {person} {action} next to {animal} {setting}, {building} in the distance, {light}, {view}, rich in"
    " detail, calm mood",
)  # fmt: skip
PER_TEMPLATE = 100

WORDS = {
    "accent": ("black", "silver", "pale pink", "bright orange", "sea green", "gold"),
    "action": (
        "reading a newspaper", "playing the cello", "repairing a clock", "dancing", "carrying a stack of books",
        "laughing", "flying a kite", "painting a fence", "asleep in a chair", "holding a lantern",
    ),
    "animal": (
        "a red fox", "a sleeping cat", "a humpback whale", "two flamingos", "a peacock", "a hedgehog", "a snow leopard",
        "an octopus", "a herd of elephants", "a hummingbird", "a golden retriever puppy", "a chameleon",
        "an old tortoise", "a barn owl", "three koi", "a brown bear", "a monarch butterfly", "a white horse",
    ),
    "building": (
        "a lighthouse", "a Gothic cathedral", "a glass skyscraper", "a timber cabin", "a Japanese teahouse",
        "a ruined castle", "an Art Deco cinema", "a brutalist library", "a windmill", "a spiral staircase",
        "a stone bridge", "a domed mosque", "a row of narrow brick houses",
    ),
    "colour": (
        "red", "yellow", "turquoise", "cobalt blue", "violet", "emerald green", "ivory", "rust-brown", "coral",
        "charcoal", "mint", "crimson",
    ),
    "dish": (
        "a bowl of ramen", "ripe cherries", "a slice of chocolate cake", "grilled sardines with lemon",
        "a cup of coffee", "sourdough bread and butter", "a plate of dumplings", "a fruit salad in a glass bowl",
        "a stack of pancakes", "saffron rice", "a cheeseburger", "oysters on ice",
    ),
    "items": ("apples", "marbles", "candles", "paper boats", "buttons", "tulips", "eggs", "crayons"),
    "light": (
        "soft window light", "golden hour", "neon light", "candlelight", "harsh midday sun", "moonlight",
        "backlit by the setting sun", "studio lighting", "overcast sky", "light through mist",
    ),
    "material": (
        "cracked porcelain", "stained glass", "oak wood", "polished brass", "knitted wool", "ice", "folded paper",
        "moss", "rusty iron", "white marble", "liquid mercury", "woven straw",
    ),
    "medium": (
        "35 mm photograph", "watercolour painting", "charcoal drawing", "isometric illustration", "oil painting",
        "woodblock print", "pixel art", "3D render", "pencil sketch", "comic book panel", "linocut", "polaroid",
    ),
    "number": ("two", "three", "four", "five", "seven", "a dozen"),
    "pattern": (
        "concentric circles", "overlapping triangles", "flowing waves", "ink blots", "fractal branches", "grid of dots",
        "broken stripes", "spirals", "labyrinth of lines", "swirls of smoke",
    ),
    "person": (
        "an old fisherman", "a ballet dancer", "an astronaut", "a girl with freckles", "a violin maker",
        "a firefighter", "a bearded man in a turban", "twin sisters", "a street musician", "a surgeon", "a baker",
        "a medieval knight", "a grandmother with silver hair", "a boy in a yellow raincoat",
        "a scientist in a lab coat",
    ),
    "relation": ("on top of", "under", "to the left of", "behind", "looking into", "leaning against"),
    "setting": (
        "at dawn", "in heavy rain", "under a starry sky", "in a crowded city", "beside a frozen lake", "in thick fog",
        "in a sunlit room", "on a windy cliff", "in deep snow", "at the edge of a forest", "in a desert", "underwater",
        "in a greenhouse", "at a night market", "in an empty train station",
    ),
    "sign": (
        "a shop sign", "a chalkboard", "a birthday cake with icing", "a neon sign", "a torn poster", "a road sign",
        "a hand-painted banner", "a T-shirt",
    ),
    "surface": (
        "a marble table", "a wooden board", "a checked tablecloth", "a slate plate", "wet sand", "a velvet cushion",
        "an old newspaper", "a stainless steel counter",
    ),
    "thing": (
        "teapot", "bicycle", "chess set", "suitcase", "typewriter", "grand piano", "pocket watch", "rocking chair",
        "robot", "telescope", "pair of boots", "violin", "vase", "helmet", "lamp", "cactus",
    ),
    "vehicle": (
        "a steam locomotive", "a hot air balloon", "a wooden rowing boat", "a vintage motorcycle", "a red tram",
        "a container ship", "a tractor", "a rusty pickup truck", "a biplane", "a bicycle courier",
    ),
    "view": (
        "close-up", "wide angle", "seen from above", "low angle", "shallow depth of field", "symmetrical composition",
        "macro", "silhouette", "long exposure", "black and white",
    ),
    "words": ("OPEN LATE", "Hello, World!", "Bäckerei", "50% OFF", "Mind the gap", "1984", "Fresh Fish", "¡Fiesta!"),
}  # fmt: skip


def emoji(seed: int = 0) -> list[str]:
    """The names that the shipped model was trained on, shuffled, so that the first few are varied."""
    names = training_names()
    return list(dict.fromkeys(names[i] for i in generator("prompts.seed", seed).permutation(len(names))))


def builtin(seed: int = 0) -> list[str]:
    """1,400 distinct prompts of 14 kinds; each run of 14 has one of every kind, in a random order."""
    random = generator("prompts.seed", seed)
    decks = {name: _deck(words, random) for name, words in WORDS.items()}
    prompts: dict[str, None] = {}
    for _ in range(PER_TEMPLATE):
        for kind in random.permutation(len(TEMPLATES)):
            while (prompt := _compose(TEMPLATES[kind], decks)) in prompts:
                pass
            prompts[prompt] = None
    return list(prompts)


def _deck(words: Sequence[str], random: np.random.RandomState) -> Iterator[str]:
    """Yield the words endlessly, in a new random order each round, so that each comes once before any comes again."""
    while True:
        yield from (words[i] for i in random.permutation(len(words)))


def _compose(template: str, decks: Mapping[str, Iterator[str]]) -> str:
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    return template.format(**{name: next(decks[name]) for name in names})


def from_file(path: str = "", column: str = COLUMN) -> list[str]:
    """The prompts of a file, in its order; ``column`` names a table's column, or the key or path of keys in JSON."""
    return prompt_files.read(path, column)


def report_duplicates(prompts: Sequence[str]) -> None:
    """Report on stderr how many prompts repeat an earlier one; they are kept, as every image has its own seed."""
    counts = Counter(prompts)
    repeated = len(prompts) - len(counts)
    if repeated:
        example, times = counts.most_common(1)[0]
        verb = "repeats" if repeated == 1 else "repeat"
        note(
            f"prompts: {repeated} of {len(prompts)} {verb} an earlier one, e.g. {quoted(example)}"
            f" ({times} times); they are kept, each is drawn with a seed of its own"
        )
