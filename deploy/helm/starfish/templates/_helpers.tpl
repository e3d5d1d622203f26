{{- define "starfish.name" -}}
{{- if contains "starfish" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-starfish" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What a pod is labelled with: no version, so that a new chart alone replaces no pod. */}}
{{- define "starfish.selector" -}}
app.kubernetes.io/name: starfish
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Of every other object. */}}
{{- define "starfish.labels" -}}
{{ include "starfish.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "starfish.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{- define "starfish.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "starfish.name" .) }}
{{- end }}

{{- define "starfish.scheme" -}}
{{ if .Values.gateway.tlsSecret }}HTTPS{{ else }}HTTP{{ end }}
{{- end }}

{{- define "starfish.numRanks" -}}
{{ .Values.controlPlane.ranks | default (mul .Values.ranks.hosts .Values.ranks.perHost) }}
{{- end }}

{{/* Arguments that all services have. `certificate`: the folder with the service's own. */}}
{{- define "starfish.commonArgs" -}}
- --etcd={{ .Values.etcd.endpoints | join "," }}
{{- if .Values.etcd.tls.enabled }}
- --etcd-ca=/etc/starfish/etcd/ca.crt
- --etcd-cert=/etc/starfish/etcd/tls.crt
- --etcd-key=/etc/starfish/etcd/tls.key
{{- with .Values.etcd.serverName }}
- --etcd-server-name={{ . }}
{{- end }}
{{- end }}
- --instance={{ .Values.instance }}
- --secret-file=/etc/starfish/instance/secret
- --log-level={{ .Values.log.level }}
{{- if .Values.log.json }}
- --log-json
{{- end }}
{{- end }}

{{- define "starfish.env" -}}
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{- define "starfish.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* 0440: files belong to root, and the pod's group reads them. */}}
{{- define "starfish.volumes" -}}
- name: tmp
  emptyDir: {}
- name: instance-secret
  secret: {secretName: {{ .root.Values.secrets.instance }}, defaultMode: 0440}
{{- if .root.Values.etcd.tls.enabled }}
- name: etcd-certificate
  secret: {secretName: {{ .etcdSecret }}, defaultMode: 0440}
{{- end }}
- name: models
  {{- /* Not in values.yaml: another source there would be merged with it. */}}
  {{- $default := dict "persistentVolumeClaim" (dict "claimName" "models") }}
  {{- toYaml (.root.Values.model.volume | default $default) | nindent 2 }}
{{- end }}

{{- define "starfish.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: instance-secret, mountPath: /etc/starfish/instance, readOnly: true}
{{- if .Values.etcd.tls.enabled }}
- {name: etcd-certificate, mountPath: /etc/starfish/etcd, readOnly: true}
{{- end }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}

{{- define "starfish.podSettings" -}}
serviceAccountName: {{ include "starfish.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Replicas of a Deployment on different hosts, and in different zones, if that can be. */}}
{{- define "starfish.spread" -}}
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "starfish.selector" $ | nindent 6 }}
{{- end }}
{{- end }}
