/* An HTTP server that streams tokens on an exact schedule and logs when it really sent each one.
 *
 * It is the yardstick of the load generator: whatever its log says is the truth. One thread, epoll, a heap of due
 * times; one send() a token. It knows just enough HTTP for one client: POST with Content-Length, GET, keep-alive.
 *
 *   server TTFT_US ITL_US GRID_US LOG     prints "PORT <n>" when it listens, on loopback; ends on SIGTERM
 *
 * A request's first token is due TTFT_US times a factor of 0.5 to 1.5 (it depends on the request's number only) after
 * the request arrived, by the kernel's receive stamp; the others every ITL_US after it. GRID_US > 0 moves every due
 * time up to the next multiple of it on the wall clock, the same for all streams.
 *
 * LOG, in 64-bit little-endian integers, CLOCK_REALTIME nanoseconds: for each request whose answer was sent whole:
 * arrival, number of tokens, and the time just before each token's send().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { IN_BYTES = 1 << 18, MAX_FDS = 1 << 16, EVENTS = 512 };

typedef struct {
    int fd, in_heap;          /* in_heap: index in the heap, -1: idle */
    int64_t arrived, due;     /* ns */
    int64_t *sent;            /* ns, one a token */
    int tokens, next, pending, pending_at;
    char out[512];            /* what of the current send() did not go out yet: pending bytes from pending_at */
    char *in;
    size_t have;
} Conn;

static Conn *conns[MAX_FDS];
static Conn *heap[MAX_FDS];
static int heap_size;
static int64_t ttft_ns, itl_ns, grid_ns;
static uint64_t numbered;
static FILE *truth;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void put(int i, Conn *c) { heap[i] = c; c->in_heap = i; }

static void sift(int i) {
    Conn *c = heap[i];
    for (; i > 0 && heap[(i - 1) / 2]->due > c->due; i = (i - 1) / 2) put(i, heap[(i - 1) / 2]);
    for (;;) {
        int child = 2 * i + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= c->due) break;
        put(i, heap[child]);
        i = child;
    }
    put(i, c);
}

static void heap_add(Conn *c) { put(heap_size++, c); sift(c->in_heap); }

static void heap_remove(Conn *c) {
    int i = c->in_heap;
    c->in_heap = -1;
    if (i < 0 || i == --heap_size) return;
    put(i, heap[heap_size]);
    sift(i);
}

static void drop(Conn *c) {
    heap_remove(c);
    close(c->fd);
    conns[c->fd] = NULL;
    free(c->sent);
    free(c->in);
    free(c);
}

static int64_t on_grid(int64_t t) { return grid_ns > 0 ? (t + grid_ns - 1) / grid_ns * grid_ns : t; }

/* One event as HTTP chunk(s) into c->out. The last token's event is followed by totals, [DONE] and the end. */
static void render(Conn *c) {
    char event[400];
    int n = snprintf(event, sizeof event,
        "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
        "\"model\":\"exact\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" tok%d\"},\"finish_reason\":%s}],"
        "\"usage\":{\"prompt_tokens\":16,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n",
        c->next, c->next + 1 == c->tokens ? "\"length\"" : "null", c->next + 1, c->next + 17);
    c->pending = snprintf(c->out, sizeof c->out, "%x\r\n%s\r\n%s", n, event,
        c->next + 1 == c->tokens ? "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" : "");
    c->pending_at = 0;
}

static void finish(Conn *c) {
    int64_t head[2] = {c->arrived, c->tokens};
    heap_remove(c);
    fwrite(head, sizeof head, 1, truth);
    fwrite(c->sent, sizeof *c->sent, c->tokens, truth);
}

/* Sends the token that is due; when the socket is full, what is left follows a millisecond later. */
static void send_token(Conn *c) {
    if (!c->pending) {
        render(c);
        c->sent[c->next] = now_ns();
    }
    ssize_t n = send(c->fd, c->out + c->pending_at, c->pending, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN) {
        drop(c);
        return;
    }
    if (n > 0) c->pending -= n, c->pending_at += n;
    if (c->pending) {
        c->due = now_ns() + 1000000;
    } else if (++c->next == c->tokens) {
        finish(c);
        return;
    } else {
        c->due = on_grid(c->due + itl_ns);
    }
    sift(c->in_heap);
}

static void reply(Conn *c, const char *type, const char *body) {
    char out[512];
    int n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", type,
                     strlen(body), body);
    if (send(c->fd, out, n, MSG_NOSIGNAL) < 0) perror("send");
}

static void begin(Conn *c, int64_t arrived, const char *body) {
    static const char head[] =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    const char *wanted = strstr(body, "\"max_tokens\":");
    c->tokens = wanted ? atoi(wanted + 13) : 16;
    if (c->tokens < 1) c->tokens = 1;
    c->sent = realloc(c->sent, c->tokens * sizeof *c->sent);
    c->arrived = arrived;
    c->next = c->pending = 0;
    double factor = 0.5 + (numbered++ * 2654435761u % 4096) / 4096.0;
    c->due = on_grid(arrived + (int64_t)(ttft_ns * factor));
    if (send(c->fd, head, sizeof head - 1, MSG_NOSIGNAL) < 0) perror("send");
    heap_add(c);
}

/* Takes in what has come; returns 0 when the connection is gone. */
static int receive(Conn *c) {
    char control[128];
    struct iovec part = {c->in + c->have, IN_BYTES - 1 - c->have};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t n = recvmsg(c->fd, &message, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return 1;
    if (n <= 0) return 0;
    int64_t arrived = now_ns();
    for (struct cmsghdr *m = CMSG_FIRSTHDR(&message); m; m = CMSG_NXTHDR(&message, m))
        if (m->cmsg_level == SOL_SOCKET && m->cmsg_type == SO_TIMESTAMPNS) {
            struct timespec t;
            memcpy(&t, CMSG_DATA(m), sizeof t);
            arrived = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
        }
    c->have += n;
    c->in[c->have] = 0;
    char *end = strstr(c->in, "\r\n\r\n");
    if (!end) return 1;
    const char *length = strcasestr(c->in, "content-length:");
    size_t body = length && length < end ? strtoul(length + 15, NULL, 10) : 0;
    if ((size_t)(end + 4 - c->in) + body > IN_BYTES - 1) return 0;
    if (c->have < (size_t)(end + 4 - c->in) + body) return 1;
    if (!strncmp(c->in, "POST", 4)) begin(c, arrived, end + 4);
    else if (strstr(c->in, "/v1/models")) reply(c, "application/json", "{\"data\":[{\"id\":\"exact\"}]}");
    else reply(c, "application/json", "{}");
    c->have = 0;
    return 1;
}

static void accept_all(int listener, int poll) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (fd >= MAX_FDS) {
            close(fd);
            continue;
        }
        Conn *c = conns[fd] = calloc(1, sizeof *c);
        c->fd = fd;
        c->in_heap = -1;
        c->in = malloc(IN_BYTES);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    }
}

/* Until a signal that ends it: it comes as an event, so that none is missed just before the wait. */
static void serve(int listener, int poll, int timer, int ending) {
    static struct epoll_event ready[EVENTS];
    for (;;) {
        struct itimerspec when = {.it_value = {0, 0}};
        if (heap_size) when.it_value = (struct timespec){heap[0]->due / 1000000000, heap[0]->due % 1000000000};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
        int count = epoll_wait(poll, ready, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            uint64_t fired;
            if (fd == ending) return;
            else if (fd == listener) accept_all(listener, poll);
            else if (fd == timer) fired = read(timer, &fired, sizeof fired);
            else if (conns[fd] && !receive(conns[fd])) drop(conns[fd]);
        }
        /* A bounded batch, so that requests are read in time even when every token is late. */
        int64_t now = now_ns();
        for (int i = 0; i < EVENTS && heap_size && heap[0]->due <= now; i++) send_token(heap[0]);
    }
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: server TTFT_US ITL_US GRID_US LOG\n");
        return 2;
    }
    ttft_ns = atoll(argv[1]) * 1000;
    itl_ns = atoll(argv[2]) * 1000;
    grid_ns = atoll(argv[3]) * 1000;
    truth = fopen(argv[4], "wb");
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), poll = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (!truth || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) {
        perror("cannot start");
        return 1;
    }
    getsockname(listener, (struct sockaddr *)&address, &size);
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    int ending = signalfd(-1, &ends, SFD_NONBLOCK | SFD_CLOEXEC);
    int watched[] = {listener, timer, ending};
    for (int i = 0; i < 3; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = watched[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, watched[i], &event);
    }
    printf("PORT %d\n", ntohs(address.sin_port));
    fflush(stdout);
    serve(listener, poll, timer, ending);
    return fclose(truth) ? 1 : 0;
}
