"""Say how a vision-language model is asked to judge an image, and read its answer.

The questions follow the rubric of DreamBench++ (arXiv 2406.16855, section 3): the task and its
criteria, then the model's plan in its own voice (the paper's "internal thinking"), then the images.
Concept preservation is judged by shape, colour, texture and facial features, prompt following by
relevance, accuracy, completeness and context, each as one whole number from 0 to 4. The words are
this kit's own, so scores compare with the paper's in kind, not to the digit.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

#: To change with any word of the questions, with the images' size, and with :func:`parse_score`.
VERSION = "DreamBench++ rubric 2"
HIGHEST = 4  #: the best score
MOST_CHARACTERS = 8000  #: of an answer; a longer one is not what was asked for

#: Turns of (role, texts and images); the roles are "user" and "assistant".
Chat: TypeAlias = "list[tuple[str, list[str | Image.Image]]]"

_FORM = "Score: N"
#: Said after an answer without a score.
AGAIN = (
    f"That answer has no score that can be read. Answer with one line and nothing else, "
    f'"{_FORM}", where N is a whole number from 0 to 4.'
)

_CONCEPT = f"""\
You are an experienced judge of images. You will be shown reference photos of one subject, and \
then one image that a model generated. Judge how far the subject of the generated image is the \
subject of the references. Only the subject counts: another place, pose or light is no fault.

Compare the two by four aspects:
1. Shape: the outline, structure and proportions of the body, and how its parts are arranged.
2. Colour: the main colours, their hue, saturation and brightness, and where on the subject they \
are.
3. Texture: surfaces and fine details, whether they are there, sharp and true to the references. \
A style that the image is plainly drawn in is no fault by itself.
4. Facial features: of a person or an animal only, whether the face is the same one. There it \
weighs most.

Sum up all aspects in one whole number:
0, very poor: the subject has nothing to do with the references.
1, poor: it is of the same broad kind, and clearly another one.
2, fair: there is some likeness, with differences that are easy to see.
3, good: it is very like the references, with small differences.
4, excellent: it can hardly be told from the subject of the references.

Answer with the score alone, in this form:
{_FORM}"""

_CONCEPT_PLAN = f"""\
I will compare the shape, the colours, the texture and, if the subject has a face, the facial \
features of the generated subject with the references, and leave the scene aside. I will weigh \
these together on the scale from 0 (unrelated) to 4 (hardly to be told apart) and answer with \
nothing but "{_FORM}". Please show me the images."""

_PROMPT = f"""\
You are an experienced judge of images. You will be given a text, and then one image that a model \
generated from it. Judge how well the image shows what the text says.

Judge by four criteria:
1. Relevance: what the image shows is what the text is about.
2. Accuracy: the things, places, actions and qualities that the text names are there, and are \
right.
3. Completeness: nothing that matters in the text is left out.
4. Context: the surroundings and the way that things stand to each other are those of the text.

Sum up all criteria in one whole number:
0, very poor: the image shows nothing of the text.
1, poor: it meets the text in a general way and lacks most of its details.
2, fair: it shows a part of the text, and lacks some important details or gets them wrong.
3, good: it shows most of the text, with small omissions or errors.
4, excellent: it shows all of the text, precisely.

Before the score, give a very short analysis by these criteria. Answer in this form:
Analysis: your analysis
{_FORM}"""

_PROMPT_PLAN = f"""\
I will check whether the image is about what the text says (relevance), whether what the text \
names is there and right (accuracy), whether anything of weight is missing (completeness) and \
whether the surroundings fit (context). I will write a very short analysis, and then one whole \
number from 0 (nothing of the text) to 4 (all of it) as "{_FORM}". Please give me the text and \
the image."""


@dataclass(frozen=True)
class Question:
    """A measure that an image is judged by, the task in words, and the plan in the judge's."""

    measure: str
    task: str
    plan: str

    def chat(self, *parts: "str | Image.Image") -> Chat:
        """Return the turns that ask this question about these texts and images."""
        return [("user", [self.task]), ("assistant", [self.plan]), ("user", list(parts))]


CONCEPT_PRESERVATION = Question("concept_preservation", _CONCEPT, _CONCEPT_PLAN)
PROMPT_FOLLOWING = Question("prompt_following", _PROMPT, _PROMPT_PLAN)


_SCORE = re.compile(r"\bscore[ \t]*:\s*([^\n]*)", re.IGNORECASE)
#: "3", "3.0", "3/4", "3 out of 4", "3 (good)", "3 - good", "(3)" and "Good (3)", each with or
#: without a full stop.
_NUMBER = re.compile(
    r"(?:([0-4])(?:\.0)?(?: ?/ ?4| out of 4)?(?: \([a-z ]{1,12}\)| [-–—] [a-z ]{1,12})?"
    r"|[a-z ]{0,12}\(([0-4])\))\.?",
    re.IGNORECASE,
)


def parse_score(answer: str) -> int | None:
    """Return the score in an answer, from 0 to 4; None where it does not say exactly one.

    Markdown's marks, quotation marks and brackets are passed over, and so is what a model thought
    aloud before ``</think>``. The rest must have one "Score:", followed on its line or the next by
    the digit alone, or with ".0", "/4", the grade's name ("Good (3)") or a full stop; or be nothing
    but the digit.
    """
    if len(answer) > MOST_CHARACTERS:
        return None
    text = re.sub(r"[*_`#>\[\]\"'“”]", "", answer.rpartition("</think>")[2]).strip()
    found = _SCORE.findall(text)
    if not found:
        return int(text) if re.fullmatch("[0-4]", text) else None
    number = _NUMBER.fullmatch(found[0].strip()) if len(found) == 1 else None
    return int(number[1] or number[2]) if number else None
