"Texts as their tokens come are the whole texts, whatever the tokens: broken characters, single bytes, stops anywhere."
import random
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from switchable_llm.data.embedded import tiny_tokenizer

pytest.importorskip('fastapi')   # as the other rooms of the server
from switchable_llm.server.words import Stream, Words

SPECIAL = dict(unk_token='<unk>', bos_token='<s>', eos_token='</s>')

def byte_fallback():
    "As Llama 2's: what is in no piece is written as bytes of UTF-8."
    pieces = ['<unk>','<s>','</s>', *(f'<0x{b:02X}>' for b in range(256)),
              '▁','a','b','▁a','▁the','ing','é','日','▁▁','\n','.',' ,']
    t = Tokenizer(models.BPE(vocab={p:i for i,p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token='<unk>'))
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, **SPECIAL)

def byte_level():
    "As GPT-2's: all 256 bytes are pieces."
    pieces = ['<unk>','<s>','</s>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'Ġthe', 'ing', 'Ġa', 'Ã©']
    t = Tokenizer(models.BPE(vocab={p:i for i,p in enumerate(pieces)}, merges=[], unk_token='<unk>'))
    t.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t, **SPECIAL)

def some_ids(rng, n):
    "Random tokens, most of them printable, and now and then a character byte by byte."
    ids = []
    for _ in range(rng.randrange(1, 30)): ids += [rng.randrange(n)] if rng.random()<.5 else [rng.randrange(max(3, n-12), n)]
    return ids

@pytest.mark.parametrize('made', [byte_fallback, byte_level, tiny_tokenizer])
def test_a_stream_is_the_whole_text(made):
    words,rng = Words(made()),random.Random(0)
    def decode(ids): return words.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for _ in range(3000):
        ids = some_ids(rng, len(words.tokenizer))
        whole = decode(ids)
        at = rng.randrange(len(whole)+1)
        stops = [s for s in (whole[at:at+rng.randint(1, 3)], 'never') if s]*(rng.random()<.5)
        stream,said = Stream(words, stops),''
        for i in ids:
            said += stream.add(i)
            if stream.stopped: break
        said += stream.end()
        assert said==(whole if not stops or stops[0] not in whole else whole[:whole.index(stops[0])]), (ids, stops, whole)

def test_single_bytes_make_a_character_together():
    words = Words(byte_fallback())
    a,smile = words.tokenizer.convert_tokens_to_ids(['a']),words.tokenizer.convert_tokens_to_ids([f'<0x{b:02X}>' for b in '☺'.encode()])
    stream = Stream(words)
    assert [stream.add(i) for i in a+smile+a]==['a', '', '', '', '☺a']
    stream = Stream(words)
    assert [stream.add(i) for i in a+smile]==['a', '', '', ''] and stream.end()=='☺'
