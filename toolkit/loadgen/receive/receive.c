/* Reads many sockets with one call: what python.py does in Python, at a fraction of the price.
 *
 * Every connection is a line with room of its own. reader_drain reads what the epoll set has, once a line, and keeps the
 * bytes with the kernel's receive time (SO_TIMESTAMPNS) and the process's. The caller is told only of reads that may
 * matter to it: those of a loud line, those that may be the last of a chunked answer, those after which much is held,
 * and the ends of connections. The layout that reader_spool writes is that of exchange.Spool.
 *
 * Single-threaded. Lines are named by index, not by descriptor: a descriptor is used again before its last bytes are
 * fetched. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BATCH 2048 /* lines looked at in one call */
#define DONE_LINE "\ndata: [DONE]"

struct line {
    int fd; /* -1: free */
    int loud;
    char *data;
    size_t size, room, told; /* told: bytes that the caller has been given */
    int64_t *stamps;         /* pairs of seconds and nanoseconds */
    int64_t *times;
    uint32_t *sizes;
    size_t reads, read_room;
    int unstamped;
};

struct notice {
    int32_t line;
    int32_t error; /* 0: bytes; -1: the peer closed; else errno */
    const char *data;
    uint64_t size; /* bytes since the last notice of this line */
};

struct spooled {
    int64_t size, reads, last_ns;
    int32_t unstamped;
};

struct reader {
    int epoll, count, first_free;
    size_t piece, spill;
    struct line *lines;
    int *next_free;
    uint64_t reads;
    struct notice notices[BATCH];
};

struct reader *reader_new(int epoll, size_t piece, size_t spill) {
    struct reader *r = calloc(1, sizeof *r);
    if (r) r->epoll = epoll, r->piece = piece, r->spill = spill, r->first_free = -1;
    return r;
}

static void line_free(struct line *l) {
    free(l->data), free(l->stamps), free(l->times), free(l->sizes);
    memset(l, 0, sizeof *l);
    l->fd = -1;
}

void reader_delete(struct reader *r) {
    for (int i = 0; i < r->count; i++) line_free(&r->lines[i]);
    free(r->lines), free(r->next_free), free(r);
}

uint64_t reader_reads(const struct reader *r) { return r->reads; }
const struct notice *reader_notices(const struct reader *r) { return r->notices; }

static int more_lines(struct reader *r) {
    int count = r->count ? 2 * r->count : 256;
    struct line *lines = realloc(r->lines, count * sizeof *lines);
    if (lines) r->lines = lines;
    int *next = realloc(r->next_free, count * sizeof *next);
    if (next) r->next_free = next;
    if (!lines || !next) return 0;
    for (int i = count - 1; i >= r->count; i--) {
        memset(&lines[i], 0, sizeof lines[i]);
        lines[i].fd = -1;
        next[i] = r->first_free;
        r->first_free = i;
    }
    r->count = count;
    return 1;
}

/* Watches a socket; returns its line, or -errno. */
int reader_add(struct reader *r, int fd) {
    if (r->first_free < 0 && !more_lines(r)) return -ENOMEM;
    int i = r->first_free;
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
    if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, fd, &event)) return -errno;
    r->first_free = r->next_free[i];
    r->lines[i].fd = fd;
    r->lines[i].loud = 1;
    return i;
}

/* No longer watches the line's socket, which is still open; what came stays until reader_free. */
void reader_stop(struct reader *r, int i) { epoll_ctl(r->epoll, EPOLL_CTL_DEL, r->lines[i].fd, NULL); }

void reader_free(struct reader *r, int i) {
    line_free(&r->lines[i]);
    r->next_free[i] = r->first_free;
    r->first_free = i;
}

void reader_loud(struct reader *r, int i, int loud) { r->lines[i].loud = loud; }

/* Room is taken once, for all that a line holds before it is spooled; pages that are never written cost nothing. */
static int room_for(struct line *l, size_t piece, size_t spill) {
    if (l->room - l->size < piece) {
        size_t room = (l->size > spill ? 2 * l->size : spill) + 2 * piece;
        char *data = realloc(l->data, room);
        if (!data) return 0;
        l->data = data, l->room = room;
    }
    if (l->reads == l->read_room) {
        size_t room = l->read_room ? 2 * l->read_room : 64;
        int64_t *stamps = realloc(l->stamps, 16 * room);
        if (stamps) l->stamps = stamps;
        int64_t *times = realloc(l->times, 8 * room);
        if (times) l->times = times;
        uint32_t *sizes = realloc(l->sizes, 4 * room);
        if (sizes) l->sizes = sizes;
        if (!stamps || !times || !sizes) return 0;
        l->read_room = room;
    }
    return 1;
}

/* One read. Returns 0: nothing to tell, 1: tell; error as in struct notice. */
static int line_read(struct reader *r, struct line *l, int *error) {
    *error = ENOMEM;
    if (!room_for(l, r->piece, r->spill)) return 1;
    char control[64];
    struct iovec part = {l->data + l->size, r->piece};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(l->fd, &message, MSG_DONTWAIT);
    if (got < 0) {
        *error = errno;
        return errno != EAGAIN && errno != EINTR;
    }
    *error = got ? 0 : -1;
    if (!got) return 1;
    struct timespec now, stamp;
    clock_gettime(CLOCK_REALTIME, &now);
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_len >= CMSG_LEN(sizeof stamp))
        memcpy(&stamp, CMSG_DATA(head), sizeof stamp);
    else
        stamp = now, l->unstamped = 1;
    l->stamps[2 * l->reads] = stamp.tv_sec, l->stamps[2 * l->reads + 1] = stamp.tv_nsec;
    l->times[l->reads] = now.tv_sec * 1000000000LL + now.tv_nsec;
    l->sizes[l->reads++] = (uint32_t)got;
    const char *data = l->data + l->size;
    l->size += got;
    r->reads++;
    return l->loud || got < 4 || !memcmp(data + got - 4, "\r\n\r\n", 4) || l->size > r->spill ||
           memmem(data, got, DONE_LINE, sizeof DONE_LINE - 1);
}

/* Reads every line that has something; returns how many had, and how many notices there are in *told. */
int reader_drain(struct reader *r, int *told) {
    struct epoll_event events[BATCH];
    int count = epoll_wait(r->epoll, events, BATCH, 0), notices = 0;
    for (int e = 0; e < count; e++) {
        int error, i = (int)events[e].data.u32;
        struct line *l = &r->lines[i];
        if (!line_read(r, l, &error)) continue;
        r->notices[notices++] = (struct notice){i, error, l->data + l->told, l->size - l->told};
        l->told = l->size;
    }
    *told = notices;
    return count < 0 ? 0 : count;
}

/* Appends what the line holds to a file and forgets it; what it says of it is in *out. Returns 0 or errno. */
int reader_spool(struct reader *r, int i, int file, struct spooled *out) {
    struct line *l = &r->lines[i];
    size_t n = l->reads;
    *out = (struct spooled){(int64_t)l->size, (int64_t)n, 0, l->unstamped};
    if (n) {
        out->last_ns = l->stamps[2 * n - 2] * 1000000000LL + l->stamps[2 * n - 1];
        struct iovec parts[4] = {{l->data, l->size}, {l->stamps, 16 * n}, {l->times, 8 * n}, {l->sizes, 4 * n}};
        errno = 0;
        if (writev(file, parts, 4) != (ssize_t)(l->size + 28 * n)) return errno ? errno : ENOSPC;
    }
    l->size = l->told = l->reads = 0;
    l->unstamped = 0;
    return 0;
}

/* Steps over the chunks of a chunked body: http1.ChunkWalk in C. */
#define SIZE_LINE 4096
struct walk {
    int64_t skip;  /* bytes until the next size line: of the chunk's data and the line end behind it */
    int64_t extra; /* bytes that follow the end */
    int32_t trailers, ended, kept;
    char line[SIZE_LINE]; /* a size line, or one of the trailers, that is not whole */
};

/* At most 15 hexadecimal digits, white space, and whatever follows a semicolon: http1.chunk_size. */
static int64_t chunk_size(const char *line, int64_t size) {
    int64_t value = 0, i = 0;
    for (; i < size && i < 15; i++) {
        int c = line[i];
        if (c >= '0' && c <= '9') value = 16 * value + c - '0';
        else if (c >= 'a' && c <= 'f') value = 16 * value + c - 'a' + 10;
        else if (c >= 'A' && c <= 'F') value = 16 * value + c - 'A' + 10;
        else break;
    }
    if (!i) return -1;
    while (i < size && (line[i] == ' ' || line[i] == '\t' || line[i] == '\r')) i++;
    return i == size || line[i] == ';' ? value : -1;
}

/* Returns 0, 1: a chunk's size is not a number (it is in line), 2: a size line has no end. */
int walk_feed(struct walk *w, const char *data, int64_t size) {
    int64_t at = 0;
    while (!w->ended) {
        at += w->skip;
        if (at >= size) {
            w->skip = at - size;
            return 0;
        }
        w->skip = 0;
        const char *end = memchr(data + at, '\n', size - at), *line = data + at;
        int64_t length = (end ? end : data + size) - line;
        if (w->kept || !end) {
            if (w->kept + length > SIZE_LINE) return 2;
            memcpy(w->line + w->kept, line, length);
            w->kept += length;
            if (!end) return 0;
            line = w->line, length = w->kept, w->kept = 0;
        }
        at = end + 1 - data;
        if (w->trailers) {
            w->ended = !length || (length == 1 && line[0] == '\r');
            continue;
        }
        int64_t chunk = length > SIZE_LINE ? -1 : chunk_size(line, length);
        if (chunk < 0) {
            w->kept = length < 40 ? length : 40;
            memmove(w->line, line, w->kept);
            return 1;
        }
        w->skip = chunk ? chunk + 2 : 0;
        w->trailers = !chunk;
    }
    w->extra += size - at;
    return 0;
}
