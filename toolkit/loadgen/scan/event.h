/* One event of a stream: the keys of a chat.completion.chunk that openai_api.Answer looks at, with the types it expects. */

#include "json.h"

struct event { /* what of a chat.completion.chunk matters */
    struct span content, reasoning_content, reasoning, text, finish;
    int64_t prompt, completion, cached, thought; /* cached, thought: -1: the server does not say */
    int usage, choice, known;                    /* known: keys that have come; each may come once */
};

static int is(const char *key, int size, const char *name) { return (int)strlen(name) == size && !memcmp(key, name, size); }
static int once(struct event *e, int key) { return !(e->known >> key & 1) && (e->known |= 1 << key); }
static int null_or_string(struct json *j, struct span *to) { return word(j, "null") || string(j, to); }

static int whole_number(struct json *j, int64_t *to) {
    const unsigned char *begin = j->at;
    if (!digits(j) || j->at - begin > 15 || (*begin == '0' && j->at - begin > 1)) return 0;
    for (*to = 0; begin < j->at; begin++) *to = 10 * *to + *begin - '0';
    return 1;
}

static int prompt_details(struct json *j, const char *key, int size, struct event *to) {
    if (!is(key, size, "cached_tokens")) return skip(j, 0);
    return once(to, 0) && (word(j, "null") || whole_number(j, &to->cached));
}

static int completion_details(struct json *j, const char *key, int size, struct event *to) {
    if (!is(key, size, "reasoning_tokens")) return skip(j, 0);
    return once(to, 1) && (word(j, "null") || whole_number(j, &to->thought));
}

static int usage_field(struct json *j, const char *key, int size, struct event *to) {
    if (is(key, size, "prompt_tokens")) return once(to, 2) && whole_number(j, &to->prompt);
    if (is(key, size, "completion_tokens")) return once(to, 3) && whole_number(j, &to->completion);
    if (is(key, size, "prompt_tokens_details"))
        return once(to, 4) && (word(j, "null") || (to->cached = 0, fields(j, prompt_details, to)));
    if (is(key, size, "completion_tokens_details"))
        return once(to, 5) && (word(j, "null") || (to->thought = 0, fields(j, completion_details, to)));
    return skip(j, 0);
}

static int delta_field(struct json *j, const char *key, int size, struct event *to) {
    if (is(key, size, "content")) return once(to, 6) && null_or_string(j, &to->content);
    if (is(key, size, "reasoning_content")) return once(to, 7) && null_or_string(j, &to->reasoning_content);
    if (is(key, size, "reasoning")) return once(to, 8) && null_or_string(j, &to->reasoning);
    if (is(key, size, "tool_calls")) return once(to, 9) && (word(j, "null") || (next(j, '[') && next(j, ']')));
    return skip(j, 0);
}

static int choice_field(struct json *j, const char *key, int size, struct event *to) {
    if (is(key, size, "delta")) return once(to, 10) && (word(j, "null") || fields(j, delta_field, to));
    if (is(key, size, "text")) return once(to, 11) && null_or_string(j, &to->text);
    if (is(key, size, "finish_reason")) return once(to, 12) && null_or_string(j, &to->finish);
    return skip(j, 0);
}

static int chunk_field(struct json *j, const char *key, int size, struct event *to) {
    if (is(key, size, "choices")) {
        if (!once(to, 13)) return 0;
        if (word(j, "null")) return 1;
        if (!next(j, '[')) return 0;
        if (next(j, ']')) return 1;
        to->choice = 1;
        return fields(j, choice_field, to) && next(j, ']');
    }
    if (is(key, size, "usage")) return once(to, 14) && (word(j, "null") || (to->usage = 1, fields(j, usage_field, to)));
    if (is(key, size, "error")) return once(to, 15) && word(j, "null");
    return skip(j, 0);
}
