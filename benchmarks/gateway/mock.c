/* A SIMULATED model provider that costs next to nothing: one thread, epoll, keep-alive, fixed answers.
 *
 *     mock PORT
 *
 * A request whose body says `"stream":true` gets 67 server-sent events, each in a write and a chunk of its own as providers
 * flush them; any other gets one chat completion. Both report usage. Standard C and Linux only. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define ROOM 65536 /* of a request: those of the benchmark are smaller */
#define EVENTS 67
#define CHUNK "\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"mock\""
#define USAGE "\"usage\":{\"prompt_tokens\":210,\"completion_tokens\":64,\"total_tokens\":274}"

struct client { int fd; size_t used; char data[ROOM + 1]; };

static char whole[4096], frames[EVENTS][512];
static size_t whole_size, frame_sizes[EVENTS];
static const char stream_head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

static void frame(int i, const char *data) {
    frame_sizes[i] = sprintf(frames[i], "%zx\r\ndata: %s\n\n\r\n%s", strlen(data) + 8, data, i == EVENTS - 1 ? "0\r\n\r\n" : "");
}

static void prepare(void) {
    char text[1024] = "", body[2048], data[512];
    for (int i = 0; i < 64; i++) strcat(text, "word ");
    int size = sprintf(body,
        "{\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"mock\",\"choices\":[{\"index\":0,"
        "\"message\":{\"role\":\"assistant\",\"content\":\"%s\"},\"finish_reason\":\"stop\"}]," USAGE "}", text);
    whole_size = sprintf(whole, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s", size, body);
    for (int i = 0; i < 64; i++) {
        sprintf(data, "{" CHUNK ",\"choices\":[{\"index\":0,\"delta\":{%s\"content\":\"word \"},\"finish_reason\":null}]}",
                i == 0 ? "\"role\":\"assistant\"," : "");
        frame(i, data);
    }
    frame(64, "{" CHUNK ",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}");
    frame(65, "{" CHUNK ",\"choices\":[]," USAGE "}");
    frame(66, "[DONE]");
}

/* Sockets block while they are written: an answer fits into the kernel's buffer unless the reader has stopped. */
static int put(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent <= 0) return -1;
        data += sent, size -= sent;
    }
    return 0;
}

static int answer(int fd, const char *body, size_t size) {
    if (!memmem(body, size, "\"stream\":true", 13)) return put(fd, whole, whole_size);
    if (put(fd, stream_head, sizeof stream_head - 1)) return -1;
    for (int i = 0; i < EVENTS; i++)
        if (put(fd, frames[i], frame_sizes[i])) return -1;
    return 0;
}

/* Answers every whole request in the buffer; -1 ends the connection. */
static int serve(struct client *c) {
    for (;;) {
        c->data[c->used] = 0;
        char *end = memmem(c->data, c->used, "\r\n\r\n", 4);
        if (!end) return c->used < ROOM ? 0 : -1;
        *end = 0; /* so that the header is looked for in the head alone */
        char *length = strcasestr(c->data, "\r\ncontent-length:");
        *end = '\r';
        size_t head = end + 4 - c->data, body = length ? strtoul(length + 17, 0, 10) : 0, size = head + body;
        if (size > ROOM) return -1;
        if (c->used < size) return 0;
        if (answer(c->fd, c->data + head, body)) return -1;
        memmove(c->data, c->data + size, c->used -= size);
    }
}

int main(int argc, char **argv) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    signal(SIGPIPE, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) return perror("mock"), 1;
    prepare();
    struct epoll_event ready[256], watch = {.events = EPOLLIN};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &watch);
    for (;;) {
        int n = epoll_wait(epoll, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            struct client *c = ready[i].data.ptr;
            if (!c) {
                if (!(c = malloc(sizeof *c))) return 1;
                c->used = 0, c->fd = accept(listener, 0, 0);
                setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                watch.data.ptr = c;
                epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &watch);
                continue;
            }
            ssize_t got = read(c->fd, c->data + c->used, ROOM - c->used);
            if (got > 0) c->used += got;
            if (got <= 0 || serve(c)) close(c->fd), free(c);
        }
    }
}
