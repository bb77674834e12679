/* JSON as strict as RFC 8259, read without making anything of it. Every function returns 0 for what is not JSON, or not
 * as expected; control characters other than a tab are no white space here, since no line of an event holds them. */

#include <stdint.h>
#include <string.h>

#define DEPTH 64

struct json {
    const unsigned char *at, *end;
};

struct span {
    const unsigned char *at;
    int64_t size;
    int escaped;
};

struct event; /* what is wanted of an object: event.h */

typedef int field(struct json *j, const char *key, int size, struct event *to);

static void space(struct json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t')) j->at++;
}

static int next(struct json *j, char wanted) {
    space(j);
    return j->at < j->end && *j->at == wanted && ++j->at;
}

static int word(struct json *j, const char *wanted) {
    int64_t size = strlen(wanted);
    if (j->end - j->at < size || memcmp(j->at, wanted, size)) return 0;
    j->at += size;
    return 1;
}

static int utf8(const unsigned char *p, const unsigned char *end) {
    while (p < end) {
        int more = *p < 0x80 ? 0 : *p >= 0xc2 && *p < 0xe0 ? 1 : (*p & 0xf0) == 0xe0 ? 2 : *p >= 0xf0 && *p < 0xf5 ? 3 : -1;
        if (more < 0 || end - p <= more) return 0;
        if (more == 2 && ((*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f))) return 0;
        if (more == 3 && ((*p == 0xf0 && p[1] < 0x90) || (*p == 0xf4 && p[1] > 0x8f))) return 0;
        for (p++; more; more--, p++)
            if ((*p & 0xc0) != 0x80) return 0;
    }
    return 1;
}

static int hex4(const unsigned char *p, const unsigned char *end) {
    int value = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int c = p[i], digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 87 : c >= 'A' && c <= 'F' ? c - 55 : -1;
        if (digit < 0) return -1;
        value = 16 * value + digit;
    }
    return value;
}

static int string(struct json *j, struct span *to) {
    if (!next(j, '"')) return 0;
    const unsigned char *p = j->at, *end = j->end;
    int escaped = 0, high = 0;
    for (; p < end && *p != '"'; p++) {
        if (*p < 0x20) return 0;
        high |= *p;
        if (*p != '\\') continue;
        escaped = 1;
        if (++p == end || !*p || !strchr("\"\\/bfnrtu", *p)) return 0;
        if (*p == 'u') {
            int c = hex4(p + 1, end);
            if (c < 0 || (c >= 0xdc00 && c < 0xe000)) return 0;
            p += 4;
            if (c >= 0xd800 && c < 0xdc00) { /* half a character: the other half follows */
                if (end - p < 7 || p[1] != '\\' || p[2] != 'u') return 0;
                int low = hex4(p + 3, end);
                if (low < 0xdc00 || low > 0xdfff) return 0;
                p += 6;
            }
        }
    }
    if (p == end) return 0;
    *to = (struct span){j->at, p - j->at, escaped};
    j->at = p + 1;
    return !(high & 0x80) || utf8(to->at, p);
}

static int digits(struct json *j) {
    const unsigned char *begin = j->at;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') j->at++;
    return j->at > begin;
}

static int number(struct json *j) {
    if (*j->at == '-') j->at++;
    if (!word(j, "0") && !digits(j)) return 0;
    if (word(j, ".") && !digits(j)) return 0;
    if (word(j, "e") || word(j, "E")) {
        if (!word(j, "+")) word(j, "-");
        return digits(j);
    }
    return 1;
}

static int skip(struct json *j, int depth) {
    struct span ignored;
    space(j);
    if (j->at == j->end || depth == DEPTH) return 0;
    if (*j->at == '"') return string(j, &ignored);
    if (*j->at != '{' && *j->at != '[')
        return word(j, "null") || word(j, "true") || word(j, "false") || number(j);
    char closing = *j->at++ == '{' ? '}' : ']';
    if (next(j, closing)) return 1;
    do {
        if (closing == '}' && (!string(j, &ignored) || !next(j, ':'))) return 0;
        if (!skip(j, depth + 1)) return 0;
    } while (next(j, ','));
    return next(j, closing);
}

/* An object: calls ``take`` at each value, which reads it. A key with an escape may be any: not read. */
static int fields(struct json *j, field *take, struct event *to) {
    struct span key;
    if (!next(j, '{')) return 0;
    if (next(j, '}')) return 1;
    do {
        if (!string(j, &key) || key.escaped || key.size > 64 || !next(j, ':')) return 0;
        space(j);
        if (!take(j, (const char *)key.at, key.size, to)) return 0;
    } while (next(j, ','));
    return next(j, '}');
}
