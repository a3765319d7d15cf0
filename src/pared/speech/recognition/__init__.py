"""Speech recognition with CTC: vocabulary, training data, decoding, long recordings.

    >>> from pared.speech.recognition import load, transcribe
    >>> recogniser = load("folder/of/a/CTC/model")
    >>> " ".join(word.text for word in transcribe(recogniser, [waveform]))

Any of transformers' CTC models will do, with the feature extractor and the tokenizer beside it that
it was trained with. `pared train` makes one by a recipe whose data are of kind "transcripts", and
saves it as such a folder.
"""

from pared.speech.recognition.decoding import Beam, Greedy, Word
from pared.speech.recognition.model import Recogniser, load
from pared.speech.recognition.transcription import transcribe

__all__ = ["Beam", "Greedy", "Recogniser", "Word", "load", "transcribe"]
