/* Preloaded into a rank. Mooncake listens on all interfaces, without authentication, and no setting
 * changes that. This shim binds a stream socket to the address in STARFISH_DATA_BIND (default
 * 127.0.0.1) when the caller asks for the wildcard address, and marks it close-on-exec. From such a
 * listener it accepts no connection that another user of this host has made: one malformed frame
 * ends a process with Mooncake in it. Root and the own user are let in, and other hosts, which only
 * a firewall can tell apart. It leaves every other call as it is. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

typedef int (*bind_fn)(int, const struct sockaddr *, socklen_t);
typedef int (*accept_fn)(int, struct sockaddr *, socklen_t *);
typedef int (*accept4_fn)(int, struct sockaddr *, socklen_t *, int);

#define LISTENERS_MAX 64
#define ANSWER_TIMEOUT_US 200000

/* Inodes of the listeners that were bound here; a descriptor's number may be used again. */
static _Atomic ino_t listeners[LISTENERS_MAX];
static atomic_uint num_listeners;

static int is_stream(int fd) {
    int type = 0;
    socklen_t len = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_STREAM;
}

static int refuse(void) {
    errno = EADDRNOTAVAIL;
    return -1;
}

static void remember_listener(int fd) {
    struct stat found;
    if (fstat(fd, &found) == 0)
        listeners[atomic_fetch_add(&num_listeners, 1) % LISTENERS_MAX] = found.st_ino;
}

static int is_ours(int fd) {
    struct stat found;
    if (fstat(fd, &found) != 0) return 0;
    for (int i = 0; i < LISTENERS_MAX; i++)
        if (listeners[i] == found.st_ino) return 1;
    return 0;
}

static int bind_v4(bind_fn next, int fd, const struct sockaddr *addr, const char *host) {
    struct sockaddr_in to;
    memcpy(&to, addr, sizeof to);
    if (inet_pton(AF_INET, host, &to.sin_addr) != 1) return refuse();
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    remember_listener(fd);
    return next(fd, (struct sockaddr *)&to, sizeof to);
}

/* The host is IPv4; an IPv6 socket is bound to its IPv4-mapped address. */
static int bind_v6(bind_fn next, int fd, const struct sockaddr *addr, const char *host) {
    struct sockaddr_in6 to;
    struct in_addr v4;
    int off = 0;
    memcpy(&to, addr, sizeof to);
    if (inet_pton(AF_INET, host, &v4) != 1) return refuse();
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    to.sin6_addr.s6_addr[10] = to.sin6_addr.s6_addr[11] = 0xff;
    memcpy(&to.sin6_addr.s6_addr[12], &v4, sizeof v4);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    remember_listener(fd);
    return next(fd, (struct sockaddr *)&to, sizeof to);
}

int bind(int fd, const struct sockaddr *addr, socklen_t len) {
    bind_fn next = (bind_fn)dlsym(RTLD_NEXT, "bind");
    const char *host = getenv("STARFISH_DATA_BIND");
    if (next == NULL) return refuse();
    if (host == NULL || *host == '\0') host = "127.0.0.1";
    if (addr != NULL && is_stream(fd)) {
        if (addr->sa_family == AF_INET && len >= sizeof(struct sockaddr_in) &&
            ((const struct sockaddr_in *)addr)->sin_addr.s_addr == htonl(INADDR_ANY))
            return bind_v4(next, fd, addr, host);
        if (addr->sa_family == AF_INET6 && len >= sizeof(struct sockaddr_in6) &&
            IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *)addr)->sin6_addr))
            return bind_v6(next, fd, addr, host);
    }
    return next(fd, addr, len);
}

/* An address of IPv4, also if it is written as one of IPv6. */
static int ipv4_of(const struct sockaddr_storage *from, struct sockaddr_in *to) {
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)from;
    memset(to, 0, sizeof *to);
    if (from->ss_family == AF_INET) {
        memcpy(to, from, sizeof *to);
        return 1;
    }
    if (from->ss_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) return 0;
    to->sin_family = AF_INET;
    to->sin_port = v6->sin6_port;
    memcpy(&to->sin_addr, &v6->sin6_addr.s6_addr[12], sizeof to->sin_addr);
    return 1;
}

/* Only an address of this host can be bound. */
static int is_of_this_host(const struct sockaddr_in *peer) {
    bind_fn next = (bind_fn)dlsym(RTLD_NEXT, "bind");
    struct sockaddr_in any_port = *peer;
    int probe = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    any_port.sin_port = 0;
    int is_bound = probe >= 0 && next != NULL &&
                   next(probe, (struct sockaddr *)&any_port, sizeof any_port) == 0;
    int is_foreign = probe >= 0 && !is_bound && errno == EADDRNOTAVAIL;
    if (probe >= 0) close(probe);
    return !is_foreign;
}

/* What the kernel knows of this host's socket from one address to another; 0 if it tells nothing. */
static int find_socket(const struct sockaddr_in *from, const struct sockaddr_in *to,
                       struct inet_diag_msg *found) {
    struct {
        struct nlmsghdr header;
        struct inet_diag_req_v2 query;
    } request = {0};
    union {
        struct nlmsghdr header;
        char bytes[4096];
    } answer;
    struct timeval timeout = {.tv_usec = ANSWER_TIMEOUT_US};
    request.header.nlmsg_len = sizeof request;
    request.header.nlmsg_type = SOCK_DIAG_BY_FAMILY;
    request.header.nlmsg_flags = NLM_F_REQUEST;
    request.query.sdiag_family = AF_INET;
    request.query.sdiag_protocol = IPPROTO_TCP;
    request.query.idiag_states = ~0U;
    request.query.id.idiag_sport = from->sin_port;
    request.query.id.idiag_dport = to->sin_port;
    request.query.id.idiag_src[0] = from->sin_addr.s_addr;
    request.query.id.idiag_dst[0] = to->sin_addr.s_addr;
    request.query.id.idiag_cookie[0] = request.query.id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (fd < 0) return 0;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    ssize_t length = -1;
    if (send(fd, &request, sizeof request, 0) == (ssize_t)sizeof request)
        length = recv(fd, &answer, sizeof answer, 0);
    close(fd);
    if (length < (ssize_t)NLMSG_LENGTH(sizeof *found)) return 0;
    if (answer.header.nlmsg_type != SOCK_DIAG_BY_FAMILY) return 0;
    memcpy(found, NLMSG_DATA(&answer.header), sizeof *found);
    return 1;
}

static int addresses_of(int fd, struct sockaddr_in *own, struct sockaddr_in *peer) {
    struct sockaddr_storage from;
    socklen_t length = sizeof from;
    if (getsockname(fd, (struct sockaddr *)&from, &length) != 0 || !ipv4_of(&from, own)) return 0;
    length = sizeof from;
    return getpeername(fd, (struct sockaddr *)&from, &length) == 0 && ipv4_of(&from, peer);
}

/* A socket that its user has closed already has no inode, and root's id. Where the kernel does not
 * even tell of a connected socket of our own, everybody is let in. */
static int may_enter(int fd) {
    struct sockaddr_in own, peer;
    struct inet_diag_msg found;
    if (!addresses_of(fd, &own, &peer)) return 0;
    if (!is_of_this_host(&peer)) return 1;
    if (find_socket(&peer, &own, &found))
        return found.idiag_inode != 0 && (found.idiag_uid == geteuid() || found.idiag_uid == 0);
    return !find_socket(&own, &peer, &found) && addresses_of(fd, &own, &peer);
}

int accept4(int fd, struct sockaddr *addr, socklen_t *len, int flags) {
    accept4_fn next = (accept4_fn)dlsym(RTLD_NEXT, "accept4");
    if (next == NULL) return refuse();
    if (!is_ours(fd)) return next(fd, addr, len, flags);
    for (;;) {
        socklen_t room = len != NULL ? *len : 0;
        int accepted = next(fd, addr, len, flags);
        if (accepted < 0 || may_enter(accepted)) return accepted;
        close(accepted);
        if (len != NULL) *len = room;
    }
}

int accept(int fd, struct sockaddr *addr, socklen_t *len) {
    accept_fn next = (accept_fn)dlsym(RTLD_NEXT, "accept");
    if (next == NULL) return refuse();
    return is_ours(fd) ? accept4(fd, addr, len, 0) : next(fd, addr, len);
}
