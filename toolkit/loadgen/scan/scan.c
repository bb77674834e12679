/* Reads one answer: from the spool to chunks of tokens, what answers.py and openai_api.Answer do in Python.
 *
 * Only what is regular is read: a whole answer, chunked or not, of events with one line of JSON each, whose known keys
 * have the expected types. Of anything else scan_events says no, and Python reads it and says what is wrong. Whatever it
 * says yes to, Python reads the same: tests/unit/test_loadgen_scan.py. */

#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/uio.h>

#include "event.h"

struct scan {
    /* Of the answer: bytes, and for each read the kernel's time, the process's, and where it ended. */
    char *data;
    int64_t *kernel_ns, *read_ns, *ends;
    int64_t size, reads;
    /* Found: chunks with their time after sent_ns and their tokens, text in UTF-8, and openai_api.Answer's attributes. */
    double *chunk_s;
    int64_t *chunk_tokens;
    char *text;
    const char *finish;
    int64_t chunks, text_size, finish_size, prompt_tokens, cached_tokens, reasoning_tokens, completion_tokens;
    int64_t first_visible_ns, shared, late;
    int32_t done, counted_each;
    /* Its own. */
    int64_t room, read_room, attributed, last_token_read, blur_ns;
    int64_t *stamps;
    uint32_t *sizes;
    int32_t seen;
};

struct scan *scan_new(void) { return calloc(1, sizeof(struct scan)); }

void scan_delete(struct scan *s) {
    void *all[] = {s->data, s->kernel_ns, s->read_ns, s->ends, s->chunk_s, s->chunk_tokens, s->text, s->stamps, s->sizes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(s);
}

static int grow(void *at, int64_t bytes) {
    void *got = realloc(*(void **)at, bytes);
    if (got) *(void **)at = got;
    return got != NULL;
}

static int room_for(struct scan *s, int64_t size, int64_t reads) {
    if (size > s->room) {
        if (!grow(&s->data, 2 * size) || !grow(&s->text, 2 * size)) return 0;
        s->room = 2 * size;
    }
    if (reads > s->read_room) {
        int64_t n = 2 * reads;
        if (!grow(&s->kernel_ns, 8 * n) || !grow(&s->read_ns, 8 * n) || !grow(&s->ends, 8 * n) ||
            !grow(&s->chunk_s, 8 * n) || !grow(&s->chunk_tokens, 8 * n) || !grow(&s->stamps, 16 * n) ||
            !grow(&s->sizes, 4 * n))
            return 0;
        s->read_room = n;
    }
    return 1;
}

/* Takes an answer out of the spool (exchange.Spool): segments of (offset, bytes, reads). Returns where its head ends,
 * -1: it has no whole one, -2: it could not be read. */
int64_t scan_load(struct scan *s, int file, const int64_t *segments, int count) {
    int64_t size = 0, reads = 0;
    for (int i = 0; i < count; i++) size += segments[3 * i + 1], reads += segments[3 * i + 2];
    s->size = s->reads = 0;
    if (!room_for(s, size, reads)) return -2;
    for (int i = 0; i < count; i++) {
        int64_t bytes = segments[3 * i + 1], n = segments[3 * i + 2], end = s->size;
        struct iovec parts[4] = {{s->data + s->size, bytes}, {s->stamps, 16 * n}, {s->read_ns + s->reads, 8 * n}, {s->sizes, 4 * n}};
        if (preadv(file, parts, 4, segments[3 * i]) != bytes + 28 * n) return -2;
        for (int64_t k = 0; k < n; k++) {
            s->kernel_ns[s->reads + k] = s->stamps[2 * k] * 1000000000 + s->stamps[2 * k + 1];
            s->ends[s->reads + k] = end += s->sizes[k];
        }
        s->size += bytes, s->reads += n;
    }
    const char *end = s->size ? memmem(s->data, s->size, "\r\n\r\n", 4) : NULL;
    return end ? end - s->data : -1;
}

/* Appends a string to the text. */
static void say(struct scan *s, const struct span *said) {
    char *to = s->text + s->text_size;
    if (!said->escaped) {
        memcpy(to, said->at, said->size);
        s->text_size += said->size;
        return;
    }
    for (const unsigned char *p = said->at, *end = p + said->size; p < end; p++) {
        if (*p != '\\') {
            *to++ = *p;
            continue;
        }
        static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
        if (*++p != 'u') {
            *to++ = into[strchr(from, *p) - from];
            continue;
        }
        int c = hex4(p + 1, end);
        p += 4;
        if (c >= 0xd800 && c < 0xdc00) {
            c = 0x10000 + ((c - 0xd800) << 10) + hex4(p + 3, end) - 0xdc00;
            p += 6;
        }
        if (c < 0x80) *to++ = c;
        else if (c < 0x800) *to++ = 0xc0 | c >> 6, *to++ = 0x80 | (c & 63);
        else if (c < 0x10000) *to++ = 0xe0 | c >> 12, *to++ = 0x80 | (c >> 6 & 63), *to++ = 0x80 | (c & 63);
        else *to++ = 0xf0 | c >> 18, *to++ = 0x80 | (c >> 12 & 63), *to++ = 0x80 | (c >> 6 & 63), *to++ = 0x80 | (c & 63);
    }
    s->text_size = to - s->text;
}

/* openai_api.Answer._append: tokens that came with a read. */
static void append(struct scan *s, int64_t tokens, int64_t read, int64_t sent_ns) {
    double at = (double)(s->kernel_ns[read] - sent_ns) * 1e-9;
    s->attributed += tokens;
    if (s->chunks && s->chunk_s[s->chunks - 1] == at) s->chunk_tokens[s->chunks - 1] += tokens;
    else s->chunk_s[s->chunks] = at, s->chunk_tokens[s->chunks++] = tokens;
    if (tokens > 0 && read == s->last_token_read) {
        s->shared++;
        s->late += s->read_ns[read] - s->kernel_ns[read] > s->blur_ns;
    }
    if (tokens > 0) s->last_token_read = read;
}

/* openai_api.Answer._take_chunk. */
static int take(struct scan *s, const struct event *e, int64_t read, int64_t sent_ns) {
    if (e->usage) {
        s->prompt_tokens = e->prompt, s->completion_tokens = e->completion;
        if (e->cached >= 0) s->cached_tokens = e->cached;
        if (e->thought >= 0) s->reasoning_tokens = e->thought;
    }
    if (!e->choice) return 1;
    if (e->finish.size) s->finish = (const char *)e->finish.at, s->finish_size = e->finish.size;
    const struct span *thought = e->reasoning_content.size ? &e->reasoning_content : &e->reasoning;
    const struct span *said = e->content.size ? &e->content : &e->text;
    int visible = said->size > 0, output = visible || thought->size > 0;
    if (e->finish.escaped) return 0;
    if (thought->size) say(s, thought);
    if (visible) say(s, said);
    if (visible && !s->first_visible_ns) s->first_visible_ns = s->kernel_ns[read];
    int64_t tokens = output;
    if (output && !s->seen) {
        int64_t before = s->attributed;
        s->seen = 1, s->counted_each = e->usage;
        s->attributed = s->chunks = 0;
        tokens = !e->usage ? before + 1 : before > e->completion ? before : e->completion;
        append(s, tokens, read, sent_ns);
        return 1;
    }
    if (s->counted_each) tokens = e->usage ? e->completion - s->attributed : 0;
    else if (e->usage && !s->seen) tokens = e->completion - s->attributed;
    if (tokens > 0) append(s, tokens, read, sent_ns);
    return 1;
}

static int take_event(struct scan *s, const char *data, int64_t size, int64_t read, int64_t sent_ns) {
    struct json j = {(const unsigned char *)data, (const unsigned char *)data + size};
    struct event event = {.cached = -1, .thought = -1};
    if (s->done) return 0;
    if (size == 6 && !memcmp(data, "[DONE]", 6)) return s->done = 1;
    if (!fields(&j, chunk_field, &event)) return 0;
    space(&j);
    return j.at == j.end && take(s, &event, read, sent_ns);
}

/* The size of the chunk at ``at``, and where its data begins; -1: not one without an extension. */
static int64_t chunk_at(const struct scan *s, int64_t *at) {
    int64_t value = 0, begin = *at;
    for (; *at < s->size && *at - begin < 15; ++*at) {
        int c = s->data[*at], digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 87 : c >= 'A' && c <= 'F' ? c - 55 : -1;
        if (digit < 0) break;
        value = 16 * value + digit;
    }
    if (*at == begin || s->size - *at < 2 || memcmp(s->data + *at, "\r\n", 2)) return -1;
    *at += 2;
    return value;
}

/* Reads the events of the answer that was loaded, from where its head has ended; once. Returns 1, or 0: not regular. */
int scan_events(struct scan *s, int64_t at, int chunked, int64_t sent_ns, int64_t blur_ns) {
    int64_t body = at, line = at, event = -1, event_size = 0, read = 0; /* body: where the chunks are moved together */
    s->chunks = s->text_size = s->finish_size = s->prompt_tokens = s->cached_tokens = 0;
    s->reasoning_tokens = s->first_visible_ns = s->shared = s->late = s->attributed = 0;
    s->completion_tokens = s->last_token_read = -1;
    s->done = s->counted_each = s->seen = 0;
    s->blur_ns = blur_ns;
    for (;;) {
        int64_t size = chunked ? chunk_at(s, &at) : s->size - at;
        if (size < 0 || size > s->size - at) return 0;
        if (!size) break;
        memmove(s->data + body, s->data + at, size);
        int64_t moved = at - body, looked = body;
        body += size, at += size;
        for (char *stop; (stop = memchr(s->data + looked, '\n', body - looked)); line = looked) {
            int64_t end = stop - s->data;
            looked = end + 1;
            int64_t length = end - line - (end > line && stop[-1] == '\r');
            if (!length) {
                while (s->ends[read] <= end + moved) read++;
                if (event >= 0 && !take_event(s, s->data + event, event_size, read, sent_ns)) return 0;
                event = -1;
            } else if (s->data[line] == ':') {
                if (memchr(s->data + line, '\r', length)) return 0; /* a lone \r ends a line too */
            } else {
                int64_t skip = length > 5 && s->data[line + 5] == ' ' ? 6 : 5;
                if (event >= 0 || length < 5 || memcmp(s->data + line, "data:", 5)) return 0;
                event = line + skip, event_size = length - skip;
            }
        }
        if (!chunked) break;
        if (s->size - at < 2 || memcmp(s->data + at, "\r\n", 2)) return 0;
        at += 2;
    }
    return event < 0 && line == body;
}
