"""The wordings of the tasks. The demo and the suites use the first wording of each task.

Each wording has its own form of answer: some answers repeat the question first, others begin with
what was asked for.
"""

from __future__ import annotations

WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "color": (
        ("what color is the {glyph}?", "the {glyph} in picture {n} is {colour}"),
        ("somewhere is a {glyph}. say its color.", "{colour}"),
        ("which color has the {glyph}?", "the {glyph} in picture {n} is {colour}"),
    ),
    "refcolor": (
        ("what color is the {glyph} in picture {n}?", "the {glyph} in picture {n} is {colour}"),
        ("picture {n} has a {glyph}. say its color.", "{colour}"),
        ("which color has the {glyph} of picture {n}?", "the {glyph} in picture {n} is {colour}"),
        ("look at picture {n}: is the {glyph} red, blue or what?", "it is {colour}"),
    ),
    "what": (
        ("what is {colour} in picture {n}?", "the {colour} object in picture {n} is the {glyph}"),
        ("name the {colour} object of picture {n}.", "{glyph}"),
        ("in picture {n}, which object is {colour}?", "the {glyph} is {colour}"),
        (
            "picture {n} has a {colour} object. what is it?",
            "the {colour} object in picture {n} is the {glyph}",
        ),
    ),
    "which": (
        ("which picture has the {colour} {glyph}?", "the {colour} {glyph} is in picture {n}"),
        ("find the {colour} {glyph}.", "picture {n}"),
        ("where is the {colour} {glyph}?", "the {colour} {glyph} is in picture {n}"),
    ),
    "all": (
        ("list the {colour} objects.", "{content}"),
        ("which objects are {colour}?", "the {colour} objects: {content}"),
    ),
    "describe": (
        ("describe picture {n}.", "picture {n}: {content}"),
        ("what is in picture {n}?", "{content}"),
        ("list all objects of picture {n} with their colors.", "{content}"),
        ("tell me what picture {n} shows.", "picture {n} shows {content}"),
    ),
    "describe_all": (
        ("describe all pictures.", "{content}"),
        ("what do the pictures show?", "{content}"),
        ("go through the pictures one by one.", "the pictures show this. {content}"),
    ),
    "read": (
        ("read picture {n}.", "picture {n}: {content}"),
        ("what does the text in picture {n} say?", "{content}"),
        ("spell the letters of picture {n}.", "the letters are {content}"),
    ),
}

SYSTEM = (
    "you are a careful assistant.",
    "you are an assistant that looks at pictures and answers in few words.",
    "answer what the user asks. do not guess. look at every picture first.",
    "this is a test of sight. the pictures show letters and shapes in several colors, on paper or "
    "on photographs, and the user wants to know what is where. some of them are hard to see.",
)
CHAT = (  # earlier turns that are not about the answer
    ("hello, can you help me?", "yes, what is it about?"),
    ("good morning.", "good morning. what can i do for you?"),
    ("do you like letters?", "yes, i like all letters and shapes."),
    ("how many colors are there?", "there are eight colors: red, green, blue, black, gray, teal, "
     "brown and yellow."),
    ("i have some pictures for you. i took them this morning and i do not know what they show.",
     "let me see them, then i tell you what is in each of them."),
)  # fmt: skip
LEADS = ("", "", "", "look at this. ", "here are some pictures. ", "i made these pictures. ")
TAILS = ("", "", "", " thank you.", " please be exact.", " take your time and look at all of it.")
