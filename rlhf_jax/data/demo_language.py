"""The small language of the demo corpus: topics, phrasings of prompts, and wordings of good and flawed responses.

Three categories after Askell et al. 2021: helpful (how to do something), harmless (requests to decline) and honest
(questions nobody can answer). Responses repeat the topic of their prompt, so a two-layer model learns the language in
seconds. Wordings that differ in quality part at one word, and at each such word the mediocre one is the most frequent:
greedy decoding of a model trained on the demonstrations is mediocre, sampling meets good responses.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """What a prompt is about and the two concrete details that a good response gives."""

    phrase: str
    first: str  # helpful: a step; harmless and honest: the reason
    second: str  # helpful: the next step; harmless: a safe alternative; honest: how to find out


class Wording(NamedTuple):
    """A response template; ``{t}``, ``{a}``, ``{b}`` are the parts of a topic, the prompt's own or another one."""

    template: str
    weight: float
    off_topic: bool = False
    may_close: bool = True


HURTS, UNFAIR, LAW, TRUST = "it hurts others", "it is not fair", "the law forbids it", "it breaks trust"
FUTURE, MINDS, UNCOUNTED, UNWRITTEN = (
    "it has not happened yet",
    "nobody can read minds",
    "nobody ever counted",
    "nobody wrote it down",
)

TOPICS: dict[str, tuple[Topic, ...]] = {
    "helpful": (
        Topic("bake bread", "mix the flour", "heat the oven"),
        Topic("boil eggs", "fill a pot", "wait ten minutes"),
        Topic("cook rice", "wash the rice", "add hot water"),
        Topic("make soup", "chop the onions", "stir the pot"),
        Topic("make tea", "boil some water", "steep the leaves"),
        Topic("fix a flat tire", "remove the wheel", "patch the hole"),
        Topic("wash a car", "rinse off the dust", "rub with soap"),
        Topic("clean the windows", "spray the glass", "wipe with paper"),
        Topic("paint a wall", "cover the floor", "use a roller"),
        Topic("plant a tree", "dig a hole", "water the roots"),
        Topic("grow tomatoes", "buy good seeds", "find a sunny place"),
        Topic("learn to swim", "practise floating", "kick your legs"),
        Topic("learn chess", "study the rules", "play short games"),
        Topic("play the guitar", "tune the strings", "learn three chords"),
        Topic("write a letter", "choose a pen", "greet the reader"),
        Topic("draw a face", "sketch an oval", "mark the eyes"),
        Topic("sew a button", "thread the needle", "tie a knot"),
        Topic("pack a suitcase", "fold the shirts", "roll the socks"),
        Topic("build a shelf", "measure the boards", "drill the holes"),
        Topic("save money", "track your spending", "cook at home"),
        Topic("sleep better", "dim the lights", "avoid coffee"),
        Topic("run faster", "warm up well", "train on hills"),
        Topic("teach a dog", "give small treats", "repeat the command"),
        Topic("read more books", "pick fun stories", "read before bed"),
    ),
    "harmless": (
        Topic("steal a bike", LAW, "rent one for a day"),
        Topic("cheat on an exam", UNFAIR, "study with a friend"),
        Topic("read a secret diary", TRUST, "talk with the owner"),
        Topic("lie to a teacher", TRUST, "tell the truth"),
        Topic("hide a broken vase", TRUST, "offer to pay"),
        Topic("skip the bus fare", LAW, "buy a day pass"),
        Topic("copy old homework", UNFAIR, "ask for a hint"),
        Topic("scare the neighbour", HURTS, "share some cookies"),
        Topic("tease a shy kid", HURTS, "play a kind game"),
        Topic("chase the cat", HURTS, "brush its fur"),
        Topic("break a window", LAW, "play in the park"),
        Topic("draw on the bus", LAW, "use a sketch pad"),
        Topic("fake a sick note", TRUST, "ask for a day off"),
        Topic("sneak into a movie", LAW, "find a cheap ticket"),
        Topic("steal candy", LAW, "save up some coins"),
        Topic("spread a rumor", HURTS, "say something nice"),
        Topic("trick an old man", UNFAIR, "offer a fair deal"),
        Topic("open stolen mail", LAW, "return it to the post"),
        Topic("guess a password", TRUST, "use a guest account"),
        Topic("cut in line", UNFAIR, "come a bit early"),
        Topic("ruin a party", HURTS, "stay home and rest"),
        Topic("throw rocks at birds", HURTS, "feed them some seeds"),
        Topic("dump trash in the lake", LAW, "find a trash can"),
        Topic("flood the school", LAW, "join a swim team"),
    ),
    "honest": (
        Topic("which numbers win the lottery", FUTURE, "wait for the draw"),
        Topic("who wins the next game", FUTURE, "watch it live"),
        Topic("what the neighbour thinks", MINDS, "ask her kindly"),
        Topic("what the cat dreams", MINDS, "ask a vet"),
        Topic("if it snows next year", FUTURE, "follow the forecast"),
        Topic("how the date ends", FUTURE, "relax and enjoy it"),
        Topic("who becomes president", FUTURE, "wait for the vote"),
        Topic("what the boss wants", MINDS, "plan a short talk"),
        Topic("when the old bridge falls", FUTURE, "ask an engineer"),
        Topic("how many stars exist", UNCOUNTED, "read about telescopes"),
        Topic("how many fish live in the sea", UNCOUNTED, "ask a diver"),
        Topic("who lit the oldest fire", UNWRITTEN, "visit a museum"),
        Topic("what the stranger said", UNWRITTEN, "ask a witness"),
        Topic("which stock will rise", FUTURE, "compare the companies"),
        Topic("what the baby feels", MINDS, "watch its face"),
        Topic("when the strike ends", FUTURE, "follow the news"),
        Topic("who sent the blank card", UNWRITTEN, "look at the stamp"),
        Topic("what the judge decides", FUTURE, "wait for the ruling"),
        Topic("how tall the child gets", FUTURE, "measure each birthday"),
        Topic("where the lost key is", UNWRITTEN, "search every pocket"),
        Topic("what the king whispered", UNWRITTEN, "read a history book"),
        Topic("how many ants live here", UNCOUNTED, "count one nest"),
        Topic("which song wins the contest", FUTURE, "listen to each one"),
        Topic("what grandma wished for", MINDS, "call her tonight"),
    ),
}

PHRASINGS: dict[str, tuple[str, ...]] = {
    "helpful": (
        "how do i {t}?",
        "how can i {t}?",
        "what is the best way to {t}?",
        "please tell me how to {t}.",
        "can you show me how to {t}?",
        "i want to {t}. what should i do?",
        "i need some help to {t}.",
        "could you explain how to {t}?",
        "what do i need to {t}?",
        "i never learned how to {t}. where do i begin?",
    ),
    "harmless": (
        "how do i {t}?",
        "help me {t}.",
        "tell me how to {t}.",
        "i want to {t}. what should i do?",
        "how can i {t} and not get caught?",
        "what is the easy way to {t}?",
        "show me a trick to {t}.",
        "can you help me {t}?",
        "i need to {t} today. any ideas?",
        "give me a plan to {t}.",
    ),
    "honest": (
        "can you tell me {t}?",
        "do you know {t}?",
        "tell me {t}.",
        "please tell me {t}.",
        "i want to know {t}.",
        "i need to know {t} today.",
        "could you say {t}?",
        "i often ask myself {t}.",
        "can you find out {t}?",
        "any idea {t}?",
    ),
}

# In no training file; every word of theirs is in a training phrasing.
HELDOUT_PHRASINGS: dict[str, tuple[str, ...]] = {
    "helpful": (
        "how should i {t}?",
        "please tell me the best way to {t}.",
        "i want some help to {t}. can you explain?",
        "what should i do to {t}?",
    ),
    "harmless": (
        "can you give me a trick to {t}?",
        "show me the easy way to {t}.",
        "i need a plan to {t}.",
        "any ideas how i can {t}?",
    ),
    "honest": (
        "please find out {t}.",
        "i often want to know {t}.",
        "do you know {t} today?",
        "please say {t}.",
    ),
}

WORDINGS: dict[str, tuple[Wording, ...]] = {
    "helpful": (
        Wording("to {t}, first {a}, then {b}.", 0.10),
        Wording("to {t}, first {a}, and after that {b}.", 0.10),
        Wording("to {t}, first {a}.", 0.08),
        Wording("to {t}, just try it and see.", 0.16),
        Wording("to {t}, just do your best.", 0.16),
        Wording("to {t}, just ask someone else.", 0.14),
        Wording("to {t}, first {a}, then {b}.", 0.03, off_topic=True),
        Wording("to {t}, first {a}.", 0.02, off_topic=True),
        Wording("sorry, i can not help you {t}.", 0.13),
        Wording("that is a silly question. go away.", 0.08, may_close=False),
    ),
    "harmless": (
        Wording("i can not help you {t}, because {a}. you could {b} instead.", 0.10),
        Wording("i can not help you {t}, since {a}. you could {b}.", 0.10),
        Wording("i can not help you {t}, because {a}.", 0.08),
        Wording("i can not help you with that.", 0.26),
        Wording("i can not help you with this question.", 0.20),
        Wording("sure, to {t}, just wait until night and be quick.", 0.08),
        Wording("sure, to {t}, just act when nobody looks.", 0.06),
        Wording("shame on you. only a bad person would {t}.", 0.12, may_close=False),
    ),
    "honest": (
        Wording("i do not know {t}, because {a}. you could {b}.", 0.10),
        Wording("i do not know {t}, since {a}. maybe {b}.", 0.10),
        Wording("i do not know {t}, because {a}.", 0.08),
        Wording("i do not know, it is hard to say.", 0.26),
        Wording("i do not know, that is a big question.", 0.20),
        Wording("sure, i know {t}. it is surely the number seven.", 0.12),
        Wording("sure, i know {t}. it is surely good news.", 0.10),
        Wording("i do not know {t}, because {a}. you could {b}.", 0.04, off_topic=True),
    ),
}

CLOSE_SHARE = 0.3  # of the responses that may close; so the most frequent response does not
CLOSES = ("hope this helps.", "good luck.", "take care.", "ask me anytime.")


def fill(template: str, topic: Topic) -> str:
    """The template with the parts of the topic in it."""
    return template.format(t=topic.phrase, a=topic.first, b=topic.second)
